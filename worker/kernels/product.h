// The inner loop of the matrix product: `ROWS` rows times one packed block of 16 outputs. Inside a group the sum is an
// exact int32 (64 * 127 * 32767 < 2^31); the groups follow in order of k, one fused multiply-add each. So the bits of a
// row do not depend on the rows beside it, nor on the instruction set.
#pragma once
#include "packed.h"
#include "simd.h"

namespace {

#if defined(__AVX512VNNI__)

constexpr int kMaxRows = 12;

template <int ROWS, bool PREFETCH>
LLK_INLINE void block_product(const int8_t* block, int groups, const int16_t* a, int stride, F8 (&out)[ROWS][2]) {
  constexpr int kAhead = 2 * kGroupBytes;
  // Few rows leave the unit waiting for its own results: several exact sums take turns.
  constexpr int kChains = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
  __m512 total[ROWS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) total[r] = _mm512_setzero_ps();
  for (int g = 0; g < groups; g++, block += kGroupBytes, a += kGroup) {
    __m512i exact[ROWS][kChains];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; c++) exact[r][c] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int pair = 0; pair < kPairs; pair++) {
      const int8_t* p = block + pair * kPairBytes;
      const __m512i w = _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)p));
      if (PREFETCH && pair % 2 == 0) _mm_prefetch((const char*)p + kAhead, _MM_HINT_T0);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        int32_t two;
        memcpy(&two, a + (size_t)r * stride + 2 * pair, 4);
        __m512i& sum = exact[r][pair % kChains];
        sum = _mm512_dpwssd_epi32(sum, w, _mm512_set1_epi32(two));
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int c = 1; c < kChains; c++) exact[r][0] = _mm512_add_epi32(exact[r][0], exact[r][c]);
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(block + kScalesAt)));
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[r][0]), scale, total[r]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    out[r][0].v = _mm512_castps512_ps256(total[r]);
    out[r][1].v = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(total[r]), 1));
  }
}

#elif defined(__AVX2__)

constexpr int kMaxRows = 6;

LLK_INLINE F8 scales(const int8_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_load_si128((const __m128i*)p)), 16))};
}

// low and high += two inputs times 16 outputs. In assembly because a compiler that may reorder these hoists the
// broadcasts of all rows and then spills the accumulators: 12 + 2 weights + 2 temporaries are all 16 registers.
LLK_INLINE void add_pair(__m256i& low, __m256i& high, __m256i w_low, __m256i w_high, const int16_t* two) {
  typedef int32_t __attribute__((may_alias, aligned(2))) word;
  __m256i x, t;
  asm("vpbroadcastd %[two], %[x]\n\t"
      "vpmaddwd %[w_low], %[x], %[t]\n\t"
      "vpaddd %[t], %[low], %[low]\n\t"
      "vpmaddwd %[w_high], %[x], %[x]\n\t"
      "vpaddd %[x], %[high], %[high]"
      : [low] "+x"(low), [high] "+x"(high), [x] "=&x"(x), [t] "=&x"(t)
      : [w_low] "x"(w_low), [w_high] "x"(w_high), [two] "m"(*(const word*)two));
}

template <int ROWS, bool PREFETCH>
LLK_INLINE void block_product(const int8_t* block, int groups, const int16_t* a, int stride, F8 (&out)[ROWS][2]) {
  constexpr int kAhead = 2 * kGroupBytes;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) out[r][0] = out[r][1] = splat(0.f);
  for (int g = 0; g < groups; g++, block += kGroupBytes, a += kGroup) {
    __m256i exact[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) exact[r][0] = exact[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int pair = 0; pair < kPairs; pair++) {
      const int8_t* p = block + pair * kPairBytes;
      const __m256i w_low = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)p));
      const __m256i w_high = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(p + 16)));
      if (PREFETCH && pair % 2 == 0) _mm_prefetch((const char*)p + kAhead, _MM_HINT_T0);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++)
        add_pair(exact[r][0], exact[r][1], w_low, w_high, a + (size_t)r * stride + 2 * pair);
    }
    const F8 low = scales(block + kScalesAt), high = scales(block + kScalesAt + 16);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      out[r][0] = fma({_mm256_cvtepi32_ps(exact[r][0])}, low, out[r][0]);
      out[r][1] = fma({_mm256_cvtepi32_ps(exact[r][1])}, high, out[r][1]);
    }
  }
}

#else

constexpr int kMaxRows = 4;

template <int ROWS, bool PREFETCH>
inline void block_product(const int8_t* block, int groups, const int16_t* a, int stride, F8 (&out)[ROWS][2]) {
  for (int r = 0; r < ROWS; r++) out[r][0] = out[r][1] = splat(0.f);
  for (int g = 0; g < groups; g++, block += kGroupBytes, a += kGroup) {
    int32_t exact[ROWS][kColumns] = {};
    for (int pair = 0; pair < kPairs; pair++) {
      const int8_t* p = block + pair * kPairBytes;
      for (int r = 0; r < ROWS; r++) {
        const int16_t* two = a + (size_t)r * stride + 2 * pair;
        for (int c = 0; c < kColumns; c++) exact[r][c] += p[2 * c] * two[0] + p[2 * c + 1] * two[1];
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < kColumns; c++) {
        float& total = out[r][c / 8].v[c % 8];
        total = fmaf((float)exact[r][c], scale_at(block, c), total);
      }
  }
}

#endif

// Rows of int16 activations with their scales: the left side of a product.
struct Activations {
  const int16_t* data;
  const float* scales;
  int rows, width;
};

template <int ROWS, bool PREFETCH, class Epilogue>
inline void tile(const llk_matrix& m, int block, const Activations& a, int row, Epilogue& epilogue) {
  F8 sums[ROWS][2];
  const int16_t* first = a.data + (size_t)row * a.width;
  block_product<ROWS, PREFETCH>(block_of(m, block), m.inputs / kGroup, first, a.width, sums);
  for (int r = 0; r < ROWS; r++) {
    const F8 scale = splat(a.scales[row + r]);
    epilogue(row + r, block, sums[r][0] * scale, sums[r][1] * scale);
  }
}

template <int ROWS, bool PREFETCH, class Epilogue>
inline void tile_of(int rows, const llk_matrix& m, int block, const Activations& a, int row, Epilogue& epilogue) {
  if (rows == ROWS)
    tile<ROWS, PREFETCH>(m, block, a, row, epilogue);
  else if constexpr (ROWS > 1)
    tile_of<ROWS - 1, PREFETCH>(rows, m, block, a, row, epilogue);
}

// Blocks first <= block < last of a product; `epilogue(row, block, low, high)` gets 16 outputs of a row at a time.
template <class Epilogue>
inline void multiply(const llk_matrix& m, int first, int last, const Activations& a, Epilogue epilogue) {
  const int tiles = (a.rows + kMaxRows - 1) / kMaxRows;
  for (int block = first; block < last; block++)
    for (int t = 0; t < tiles; t++) {
      const int from = a.rows * t / tiles, rows = a.rows * (t + 1) / tiles - from;
      // The first tile brings the block into the cache for those that follow.
      if (t == 0)
        tile_of<kMaxRows, true>(rows, m, block, a, from, epilogue);
      else
        tile_of<kMaxRows, false>(rows, m, block, a, from, epilogue);
    }
}

// 16 outputs, of which those past `outputs` are padding.
inline void store_outputs(float* out, int first, int outputs, F8 low, F8 high) {
  if (first + kColumns <= outputs) {
    store(out + first, low);
    store(out + first + 8, high);
    return;
  }
  float both[kColumns];
  store(both, low);
  store(both + 8, high);
  memcpy(out + first, both, sizeof(float) * (size_t)(outputs - first));
}

}  // namespace
