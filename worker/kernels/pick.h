// Picks the token of a row of logits: `worker/engine/sampling.py` says what it means. Every function of a number here is
// a fixed sequence of additions, multiplications and divisions in double, which torch repeats bit for bit; masses are
// whole numbers, so that their sums do not depend on order.
//
// A draw is the largest of `logit / temperature + noise`. Few tokens can have it, so most are only tested in fp32, with
// room for every rounding; the score proper is computed for what passes the test.
#pragma once
#include "simd.h"
#include "state.h"

namespace {

constexpr int kSpan = 64;                 // tokens that share a maximum
constexpr double kMassBits = 32;          // mass of the likeliest token: 2^32
constexpr double kNoMass = -23;           // scaled logits so far below the likeliest weigh nothing: exp(-23) 2^32 < 1/2
constexpr float kMostNoise = 23.f;        // above any Gumbel noise of 32 bits, 22.87

inline uint64_t word_of(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u;
}
inline double double_of(uint64_t u) {
  double x;
  memcpy(&x, &u, 8);
  return x;
}

// Natural logarithm of a positive normal number, after fdlibm's e_log.c.
inline double logarithm(double x) {
  const uint64_t word = word_of(x);
  double exponent = (double)((int64_t)(word >> 52) - 1023), m = double_of((word & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    exponent = exponent + 1.0;
  }
  const double f = m - 1.0, s = f / (2.0 + f), z = s * s;
  double r = 1.479819860511658591e-01;
  r = r * z + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  const double half = f * f * 0.5;
  const double low = s * (half + r * z) + exponent * 1.90821492927058770002e-10;
  return exponent * 6.93147180369123816490e-01 - ((half - low) - f);
}

// Standard Gumbel noise: -log(-log(u)) with u in the middle of each of 2^32 cells.
inline double gumbel(uint32_t word) { return -logarithm(-logarithm(((double)word + 0.5) * 0x1p-32)); }

// exp(x) 2^32 for x <= 0, to the nearest whole number.
inline double mass_of(double x) {
  const double bounded = x > kNoMass ? x : kNoMass;
  constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
  const double shifted = bounded * 1.4426950408889634 + kRounder, n = shifted - kRounder;
  const double r = (bounded - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // The lowest bits of `shifted` are n; they become the exponent of the power.
  const double power = double_of((word_of(shifted) + (uint64_t)(1023 + kMassBits)) << 52);
  return x > kNoMass ? (p * power + kRounder) - kRounder : 0.0;
}

// 32-bit numbers in 64-bit lanes, whose upper halves do not matter.
#if defined(__AVX512F__)
struct Lanes {
  static constexpr int kCount = 8;
  __m512i v;
};
LLK_INLINE Lanes lanes_of(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
LLK_INLINE Lanes every_lane(uint64_t x) { return {_mm512_set1_epi64((long long)x)}; }
LLK_INLINE void put(uint64_t* p, Lanes a) { _mm512_storeu_si512(p, a.v); }
LLK_INLINE Lanes operator^(Lanes a, Lanes b) { return {_mm512_xor_si512(a.v, b.v)}; }
LLK_INLINE Lanes product(Lanes a, Lanes b) { return {_mm512_mul_epu32(a.v, b.v)}; }
LLK_INLINE Lanes upper(Lanes a) { return {_mm512_srli_epi64(a.v, 32)}; }
#elif defined(__AVX2__)
struct Lanes {
  static constexpr int kCount = 4;
  __m256i v;
};
LLK_INLINE Lanes lanes_of(const uint64_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
LLK_INLINE Lanes every_lane(uint64_t x) { return {_mm256_set1_epi64x((long long)x)}; }
LLK_INLINE void put(uint64_t* p, Lanes a) { _mm256_storeu_si256((__m256i*)p, a.v); }
LLK_INLINE Lanes operator^(Lanes a, Lanes b) { return {_mm256_xor_si256(a.v, b.v)}; }
LLK_INLINE Lanes product(Lanes a, Lanes b) { return {_mm256_mul_epu32(a.v, b.v)}; }
LLK_INLINE Lanes upper(Lanes a) { return {_mm256_srli_epi64(a.v, 32)}; }
#else
struct Lanes {
  static constexpr int kCount = 1;
  uint64_t v;
};
LLK_INLINE Lanes lanes_of(const uint64_t* p) { return {*p}; }
LLK_INLINE Lanes every_lane(uint64_t x) { return {x}; }
LLK_INLINE void put(uint64_t* p, Lanes a) { *p = a.v; }
LLK_INLINE Lanes operator^(Lanes a, Lanes b) { return {a.v ^ b.v}; }
LLK_INLINE Lanes product(Lanes a, Lanes b) { return {(a.v & 0xffffffffu) * (b.v & 0xffffffffu)}; }
LLK_INLINE Lanes upper(Lanes a) { return {a.v >> 32}; }
#endif

// Philox4x32-10 of the counters of 64 tokens: words[i] is that of token `first` + i.
inline void philox(uint32_t first, const llk_pick_row& row, uint32_t* words) {
  constexpr int kCounters = kSpan / 4, kVectors = kCounters / Lanes::kCount;
  uint64_t counters[kCounters], pairs[4][kCounters];
  for (int i = 0; i < kCounters; i++) counters[i] = first / 4 + (uint32_t)i;
  for (int n = 0; n < kVectors; n++) {
    Lanes c0 = lanes_of(counters + n * Lanes::kCount), c1 = every_lane(row.index), c2 = every_lane(row.choice);
    Lanes c3 = every_lane(0);
    uint32_t k0 = (uint32_t)row.seed, k1 = (uint32_t)(row.seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
      const Lanes a = product(c0, every_lane(0xd2511f53u)), b = product(c2, every_lane(0xcd9e8d57u));
      c0 = upper(b) ^ c1 ^ every_lane(k0);
      c1 = b;
      c2 = upper(a) ^ c3 ^ every_lane(k1);
      c3 = a;
    }
    const Lanes all[4] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; j++) put(pairs[j] + n * Lanes::kCount, all[j]);
  }
  for (int i = 0; i < kCounters; i++)
    for (int j = 0; j < 4; j++) words[4 * i + j] = (uint32_t)pairs[j][i];
}

// A row in spans of 64 tokens; what the last one lacks is minus infinity.
struct Spans {
  const float* logits;
  int vocabulary;
  int count() const { return (vocabulary + kSpan - 1) / kSpan; }
  const float* at(int span, float* padded) const {
    const int first = span * kSpan, present = vocabulary - first;
    if (present >= kSpan) return logits + first;
    for (int i = 0; i < kSpan; i++) padded[i] = i < present ? logits[first + i] : -INFINITY;
    return padded;
  }
};

// Largest logit of each span, or of all; not a number if any is not.
inline float find_maxima(const Spans& spans, float* maxima) {
  F8 most = splat(-INFINITY), poison = splat(0.f);
  float padded[kSpan];
  for (int span = 0; span < spans.count(); span++) {
    const float* x = spans.at(span, padded);
    F8 peak = splat(-INFINITY);
    for (int i = 0; i < kSpan; i += 8) {
      const F8 value = load(x + i);
      peak = max(value, peak);
      poison = fma(min(splat(1.f), max(splat(-1.f), value)), splat(0.f), poison);
    }
    if (maxima) maxima[span] = largest(peak);
    most = max(peak, most);
  }
  return largest(most) + sum(poison);
}

inline int first_equal(const Spans& spans, const float* maxima, float value) {
  int span = 0;
  while (maxima[span] != value) span++;
  int token = span * kSpan;
  while (spans.logits[token] != value) token++;
  return token;
}

// The value at which the masses of `values`, summed from the largest value down, reach `target`; `masses` NULL: each 1.
// Both arrays are reordered.
inline float reached_at(float* values, double* masses, int count, double target) {
  double above = 0;
  for (;;) {
    const float pivot = values[count / 2];
    double greater = 0, equal = 0;
    int front = 0, middle = 0, back = count;  // [0, front) > pivot, [front, middle) == pivot, [back, count) < pivot
    while (middle < back) {
      const float value = values[middle];
      const double mass = masses ? masses[middle] : 1;
      const int other = value > pivot ? front++ : value == pivot ? middle : --back;
      (value > pivot ? greater : equal) += value < pivot ? 0 : mass;
      values[middle] = values[other];
      values[other] = value;
      if (masses) {
        masses[middle] = masses[other];
        masses[other] = mass;
      }
      middle += value >= pivot;
    }
    if (above + greater >= target && front) {
      count = front;
    } else if (above + greater + equal >= target || back == count) {
      return pivot;
    } else {
      above += greater + equal;
      values += back;
      if (masses) masses += back;
      count -= back;
    }
  }
}

// The k-th largest logit. At least k spans have one as large as the k-th largest of their maxima.
inline float kth_largest(const Spans& spans, const float* maxima, int k, float* found) {
  float bound = -INFINITY, padded[kSpan];
  if (k <= spans.count()) {
    memcpy(found, maxima, sizeof *found * (size_t)spans.count());
    bound = reached_at(found, nullptr, spans.count(), k);
  }
  int count = 0;
  for (int span = 0; span < spans.count(); span++) {
    if (maxima[span] < bound) continue;
    const float* x = spans.at(span, padded);
    for (int i = 0; i < kSpan && span * kSpan + i < spans.vocabulary; i++)
      if (x[i] >= bound) found[count++] = x[i];
  }
  return reached_at(found, nullptr, count, k);
}

// Masses of all logits that are at least `least`, 0 for the others; returns their sum.
inline double find_masses(const Spans& spans, const PickScratch& s, double temperature, double peak, float least) {
  double total = 0;
  float padded[kSpan];
  for (int span = 0; span < spans.count(); span++) {
    double* masses = s.masses + span * kSpan;
    if (s.maxima[span] < least || (double)s.maxima[span] / temperature - peak <= kNoMass) {
      memset(masses, 0, sizeof *masses * kSpan);
      continue;
    }
    const float* x = spans.at(span, padded);
    double sums[8] = {};
    for (int i = 0; i < kSpan; i += 8)
      for (int lane = 0; lane < 8; lane++) {
        const double mass = mass_of((double)x[i + lane] / temperature - peak);
        masses[i + lane] = x[i + lane] >= least ? mass : 0.0;
        sums[lane] += masses[i + lane];
      }
    for (int lane = 0; lane < 8; lane++) total += sums[lane];
  }
  return total;
}

// The least logit that top-p keeps of those that are at least `least`. What weighs less than a token's even share of what
// may be left out is left out: all of it together does not reach that.
inline float nucleus(const Spans& spans, const PickScratch& s, const llk_pick_row& row, float most, float least) {
  const double peak = (double)most / row.temperature, total = find_masses(spans, s, row.temperature, peak, least);
  const double target = row.top_p * total, share = (total - target) / spans.vocabulary * 0.999;
  int count = 0;
  for (int span = 0; span < spans.count(); span++) {
    if (mass_of((double)s.maxima[span] / row.temperature - peak) < share) continue;
    for (int token = span * kSpan; token < (span + 1) * kSpan && token < spans.vocabulary; token++) {
      const double mass = s.masses[token];
      s.values[count] = spans.logits[token];
      s.masses[count] = mass;
      count += mass > 0 && mass >= share;
    }
  }
  return reached_at(s.values, s.masses, count, target);
}

// The least logit that the filters keep. min-p compares scaled logits, whose order is that of the logits.
inline float least_kept(const Spans& spans, const PickScratch& s, const llk_pick_row& row, float most) {
  float least = -INFINITY;
  if (row.top_k > 0 && row.top_k < spans.vocabulary) least = kth_largest(spans, s.maxima, row.top_k, s.values);
  if (row.log_min_p > -INFINITY) {
    const double bound = (double)most / row.temperature + row.log_min_p;
    float lowest = INFINITY, padded[kSpan];
    for (int span = 0; span < spans.count(); span++) {
      if ((double)s.maxima[span] / row.temperature < bound) continue;
      const float* x = spans.at(span, padded);
      for (int i = 0; i < kSpan; i++)
        if ((double)x[i] / row.temperature >= bound && x[i] < lowest) lowest = x[i];
    }
    least = least > lowest ? least : lowest;
  }
  return row.top_p < 1 ? nucleus(spans, s, row, most, least) : least;
}

struct Best {
  double score;
  int token;
};

// Scores the tokens of a span that can win.
inline void draw_span(const Spans& spans, const llk_pick_row& row, int span, float least, float room, Best& best) {
  float padded[kSpan], bound[kSpan];
  const float* x = spans.at(span, padded);
  uint32_t words[kSpan];
  philox((uint32_t)(span * kSpan), row, words);
  // A token wins if -log(u) <= exp(scaled - best); 1 - u is no more than -log(u).
  const F8 inverse = splat((float)(1 / row.temperature)), shift = splat(room - (float)best.score);
  for (int i = 0; i < kSpan; i += 8) store(bound + i, exponential(fma(load(x + i), inverse, shift)) * splat(0x1p32f));
  int passed = 0;
  for (int i = 0; i < kSpan; i++) passed |= !((float)~words[i] > bound[i]);
  for (int i = 0; passed && i < kSpan; i++) {
    if ((float)~words[i] > bound[i] || !(x[i] >= least)) continue;
    const double score = (double)x[i] / row.temperature + gumbel(words[i]);
    const int token = span * kSpan + i;
    if (score > best.score || (score == best.score && token < best.token)) best = {score, token};
  }
}

inline int draw(const Spans& spans, const PickScratch& s, const llk_pick_row& row, float most, int likeliest) {
  const float least = least_kept(spans, s, row, most);
  uint32_t words[kSpan];
  philox((uint32_t)(likeliest / kSpan * kSpan), row, words);
  Best best = {(double)most / row.temperature + gumbel(words[likeliest % kSpan]), likeliest};
  for (int span = 0; span < spans.count(); span++) {
    // Ten times what fp32 can be off by.
    const float room = 1e-5f * (fabsf((float)best.score) + kMostNoise) + 1e-4f;
    const float scaled = (float)((double)s.maxima[span] / row.temperature);
    if (s.maxima[span] >= least && !(scaled - (float)best.score + room < -kMostNoise))
      draw_span(spans, row, span, least, room, best);
  }
  return best.token;
}

// The pick of a row; -1 if the model's logits are not all numbers, or the largest is not finite.
inline int pick_row(const llk_pick_row& row, int vocabulary, const PickScratch& s) {
  if (row.raw != row.logits && !isfinite(find_maxima({row.raw, vocabulary}, nullptr))) return -1;
  const Spans spans = {row.logits, vocabulary};
  const float most = find_maxima(spans, s.maxima);
  if (!isfinite(most)) return -1;
  const int likeliest = first_equal(spans, s.maxima, most);
  return row.temperature > 0 ? draw(spans, s, row, most, likeliest) : likeliest;
}

}  // namespace
