// Attention over paged keys and values, block by block in order of position with a running maximum. A score is one chain
// over the dimensions, an output one chain over the tokens: the order depends on the row's own position alone.
#pragma once
#include <stddef.h>

#include "numeric.h"
#include "state.h"

namespace {

constexpr int kTokens = LLK_BLOCK_TOKENS, kTile = LLK_KEY_TILE;
static_assert(kTile == 16 && kTokens % kTile == 0, "a vector is a tile");

// Sixteen floats, to which a query or a weight times sixteen keys or values is added.
#if defined(__AVX512F__)
constexpr int kAtOnce = 12;  // queries
struct F16 {
  __m512 v;
};
LLK_INLINE F16 load16(const float* p) { return {_mm512_loadu_ps(p)}; }
LLK_INLINE F16 load16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
LLK_INLINE void store16(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
LLK_INLINE F16 zeros16() { return {_mm512_setzero_ps()}; }
// In assembly because the compiler does not broadcast inside the instruction.
LLK_INLINE void add_scaled(F16& sum, F16 a, const float& x) {
  asm("vfmadd231ps %[x]%{1to16%}, %[a], %[sum]" : [sum] "+v"(sum.v) : [a] "v"(a.v), [x] "m"(x));
}
#else
constexpr int kAtOnce = 4;
struct F16 {
  F8 low, high;
};
LLK_INLINE F16 load16(const float* p) { return {load(p), load(p + 8)}; }
LLK_INLINE F16 load16(const uint16_t* p) { return {load_half(p), load_half(p + 8)}; }
LLK_INLINE void store16(float* p, F16 a) {
  store(p, a.low);
  store(p + 8, a.high);
}
LLK_INLINE F16 zeros16() { return {splat(0.f), splat(0.f)}; }
LLK_INLINE void add_scaled(F16& sum, F16 a, const float& x) {
  const F8 factor = splat(x);
  sum = {fma(factor, a.low, sum.low), fma(factor, a.high, sum.high)};
}
#endif

struct Half {
  typedef uint16_t type;
  static LLK_INLINE void put(uint16_t* p, F8 a) { store_half(p, max(splat(-kHalfMax), min(splat(kHalfMax), a))); }
};
struct Single {
  typedef float type;
  static LLK_INLINE void put(float* p, F8 a) { store(p, a); }
};

// What one work item needs: queries of neighbouring rows of a sequence that share a key head.
struct Queries {
  int count;
  const float* query[kMaxQueries];
  float* out[kMaxQueries];
  int first[kMaxQueries], last[kMaxQueries];  // visible positions, both included
};

struct KVHead {
  const void *keys, *values;
  const int32_t* table;
  int kv_heads, kv_head, head_dim;
  float softcap;
};

inline size_t kv_offset(int block, int kv_heads, int kv_head, int head_dim) {
  return ((size_t)block * kv_heads + kv_head) * kTokens * head_dim;
}

template <class KV>
inline const typename KV::type* keys_of(const KVHead& kv, int block) {
  return (const typename KV::type*)kv.keys + kv_offset(kv.table[block], kv.kv_heads, kv.kv_head, kv.head_dim);
}

// Scores of 16 tokens (a tile of `keys`) for N queries, which lie transposed: [dim][kMaxQueries]. `ahead`: as many elements
// that are soon to be read.
template <class T, int N>
LLK_INLINE void score_tile(const T* keys, int dim, const float* queries, float (*scores)[kTokens], const T* ahead) {
  F16 sums[N];
  repeat<N>([&](auto q) LLK_ALWAYS { sums[q.value] = zeros16(); });
  for (int d = 0; d < dim; d++, queries += kMaxQueries) {
    const F16 k = load16(keys + d * kTile);
    __builtin_prefetch(ahead + d * kTile);
    repeat<N>([&](auto q) LLK_ALWAYS { add_scaled(sums[q.value], k, queries[q.value]); });
  }
  repeat<N>([&](auto q) LLK_ALWAYS { store16(scores[q.value], sums[q.value]); });
}

// out[q] [d..d+16] += weights of tokens first <= t < last times their values, for N queries. `ahead` as above.
template <class T, int N>
LLK_INLINE void weigh_values(const T* values, int dim, int first, int last, const float (*weights)[kTokens],
                             float* const* out, int d, const T* ahead) {
  F16 sums[N];
  repeat<N>([&](auto q) LLK_ALWAYS { sums[q.value] = load16(out[q.value] + d); });
  for (int t = first; t < last; t++) {
    const F16 v = load16(values + (size_t)t * dim + d);
    __builtin_prefetch(ahead + t * kTile);
    repeat<N>([&](auto q) LLK_ALWAYS { add_scaled(sums[q.value], v, weights[q.value][t]); });
  }
  repeat<N>([&](auto q) LLK_ALWAYS { store16(out[q.value] + d, sums[q.value]); });
}

// f(from, Constant<N>()) for parts of `count` queries, N of them from `from` on.
template <int N, class F>
LLK_INLINE void with_constant(int n, int from, F& f) {
  if (n == N)
    f(from, Constant<N>());
  else if constexpr (N > 1)
    with_constant<N - 1>(n, from, f);
}
template <class F>
LLK_INLINE void in_parts(int count, F f) {
  const int parts = (count + kAtOnce - 1) / kAtOnce;
  for (int part = 0; part < parts; part++) {
    const int from = count * part / parts;
    with_constant<kAtOnce>(count * (part + 1) / parts - from, from, f);
  }
}

// Scores to weights of a block's tokens first <= t < last for one query, who sees ALL of them or those from visible_first
// to visible_last; the sums so far are rescaled.
template <bool ALL>
inline void soften(AttentionScratch& s, int q, int first, int last, int visible_first, int visible_last, int dim,
                   float cap, float* out) {
  const F8 none = splat(-INFINITY), zero = splat(0.f);
  F8 peak = none;
  for (int t = first; t < last; t += 8) {
    F8 score = load(s.scores[q] + t);
    if (cap > 0.f) score = softcap(score, cap);
    if (!ALL) score = lanes(score, none, visible_first - t, visible_last + 1 - t);
    if (!ALL || cap > 0.f) store(s.scores[q] + t, score);
    peak = max(score, peak);
  }
  const float most = largest(peak), before = s.peak[q];
  const bool visible = ALL || (visible_first < last && visible_last >= first && visible_first <= visible_last);
  const float now = visible && most > before ? most : before;
  const F8 shift = splat(now);
  if (before != now && before != -INFINITY) {
    float factors[8];
    store(factors, exponential(splat(before) - shift));
    const F8 factor = splat(factors[0]);
    for (int d = 0; d < dim; d += 8) store(out + d, load(out + d) * factor);
    store(s.total[q], load(s.total[q]) * factor);
  }
  s.peak[q] = now;
  F8 total = load(s.total[q]);
  for (int t = first; t < last; t += 8) {
    F8 weight = visible ? exponential(load(s.scores[q] + t) - shift) : zero;
    if (!ALL) weight = lanes(weight, zero, visible_first - t, visible_last + 1 - t);
    store(s.scores[q] + t, weight);
    total = total + weight;
  }
  store(s.total[q], total);
}

template <class KV>
inline void attend_block(const Queries& queries, const KVHead& kv, int block, int first, int last, const void* next,
                         AttentionScratch& s) {
  typedef typename KV::type T;
  const int dim = kv.head_dim, base = block * kTokens;
  const T* keys = keys_of<KV>(kv, block);
  const T* values = (const T*)kv.values + (keys - (const T*)kv.keys);
  const int from = first / kTile * kTile, to = (last + kTile - 1) / kTile * kTile;
  in_parts(queries.count, [&](int q, auto n) LLK_ALWAYS {
    for (int t = from; t < to; t += kTile) {
      const size_t at = (size_t)t * dim;
      float(*scores)[kTokens] = (float(*)[kTokens])(s.scores[q] + t);
      score_tile<T, n.value>(keys + at, dim, s.queries + q, scores, values + at);
    }
  });
  for (int q = 0; q < queries.count; q++) {
    const int seen_first = queries.first[q] - base, seen_last = queries.last[q] - base;
    if (seen_first <= from && seen_last >= to - 1)
      soften<true>(s, q, from, to, seen_first, seen_last, dim, kv.softcap, queries.out[q]);
    else
      soften<false>(s, q, from, to, seen_first, seen_last, dim, kv.softcap, queries.out[q]);
  }
  in_parts(queries.count, [&](int q, auto n) LLK_ALWAYS {
    for (int d = 0; d < dim; d += kTile) {
      const T* ahead = (const T*)next + d * kTokens;
      weigh_values<T, n.value>(values, dim, first, last, s.scores + q, queries.out + q, d, ahead);
    }
  });
}

// `following`: keys that this thread is likely to read next.
template <class KV>
inline void attend(const Queries& queries, const KVHead& kv, const void* following, AttentionScratch& s) {
  int first = queries.first[0], last = queries.last[0];
  for (int q = 0; q < queries.count; q++) {
    first = queries.first[q] < first ? queries.first[q] : first;
    last = queries.last[q] > last ? queries.last[q] : last;
    s.peak[q] = -INFINITY;
    store(s.total[q], splat(0.f));
    memset(queries.out[q], 0, sizeof(float) * (size_t)kv.head_dim);
    for (int d = 0; d < kv.head_dim; d++) s.queries[d * kMaxQueries + q] = queries.query[q][d];
  }
  for (int block = first / kTokens; block <= last / kTokens; block++) {
    const int base = block * kTokens;
    const int from = first > base ? first - base : 0, to = last - base < kTokens ? last - base + 1 : kTokens;
    const void* next = block < last / kTokens ? keys_of<KV>(kv, block + 1) : following;
    attend_block<KV>(queries, kv, block, from, to, next, s);
  }
  for (int q = 0; q < queries.count; q++) {
    const F8 scale = splat(1.f / sum(load(s.total[q])));
    for (int d = 0; d < kv.head_dim; d += 8) store(queries.out[q] + d, load(queries.out[q] + d) * scale);
  }
}

}  // namespace
