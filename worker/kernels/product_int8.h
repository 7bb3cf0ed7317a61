// int16 activations times one packed block of 16 int8 outputs. Inside a group the sum is an exact int32
// (64 * 127 * 32768 < 2^31); the groups follow in order of k, one fused multiply-add each. So the bits of a row depend
// neither on the rows beside it nor on the instruction set.
#pragma once
#include "packed.h"

namespace {

#if defined(__AVX512VNNI__)

struct Int8Product {
  static constexpr int kMaxRows = 16;

  // sum += two inputs, those at OFFSET of the row's present bytes, times 16 outputs. In assembly because the compiler neither
  // broadcasts inside the instruction nor finds addresses for sixteen rows that fit its registers.
  template <int ROW, int OFFSET>
  static LLK_INLINE void add_pair(__m512i& sum, __m512i w, const char* const* bases, size_t stride, size_t triple) {
#define LLK_ADD_PAIR(address)                                                                              \
  asm("vpdpwssd %c[offset]" address "%{1to16%}, %[w], %[sum]"                                              \
      : [sum] "+v"(sum)                                                                                    \
      : [w] "v"(w), [base] "r"(bases[ROW / 4]), [stride] "r"(stride), [triple] "r"(triple), [offset] "i"(OFFSET), \
        "m"(*(const char(*)[])bases[ROW / 4]))
    if constexpr (ROW % 4 == 0) LLK_ADD_PAIR("(%[base])");
    if constexpr (ROW % 4 == 1) LLK_ADD_PAIR("(%[base],%[stride])");
    if constexpr (ROW % 4 == 2) LLK_ADD_PAIR("(%[base],%[stride],2)");
    if constexpr (ROW % 4 == 3) LLK_ADD_PAIR("(%[base],%[triple])");
#undef LLK_ADD_PAIR
  }

  // Few rows leave the unit waiting for its own results: several exact sums take turns.
  static constexpr int chains(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

  // One group of inputs: exact sums of all rows. `bases` point to every fourth row.
  template <int ROWS>
  static LLK_INLINE void add_group(__m512i (&sums)[ROWS], const int8_t* p, const char* const* bases, size_t stride) {
    constexpr int kChains = chains(ROWS), kAhead = 2 * kGroupBytes, kUnroll = 4;
    __m512i exact[kChains][ROWS];
    repeat<ROWS * kChains>([&](auto n) LLK_ALWAYS { exact[n.value / ROWS][n.value % ROWS] = _mm512_setzero_si512(); });
    const char* at[(ROWS + 3) / 4];
    repeat<(ROWS + 3) / 4>([&](auto n) LLK_ALWAYS { at[n.value] = bases[n.value]; });
    for (const int8_t* end = p + kScalesAt; p < end; p += kUnroll * kPairBytes) {
      __builtin_prefetch((const char*)p + kAhead);
      __builtin_prefetch((const char*)p + kAhead + 64);
      repeat<kUnroll>([&](auto u) LLK_ALWAYS {
        const __m512i w = _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)(p + u.value * kPairBytes)));
        repeat<ROWS>([&](auto r) LLK_ALWAYS {
          add_pair<r.value, 4 * u.value>(exact[u.value % kChains][r.value], w, at, stride, 3 * stride);
        });
      });
      repeat<(ROWS + 3) / 4>([&](auto n) LLK_ALWAYS { at[n.value] += 4 * kUnroll; });
    }
    repeat<ROWS>([&](auto r) LLK_ALWAYS {
      sums[r.value] = exact[0][r.value];
      repeat<kChains - 1>([&](auto c) LLK_ALWAYS {
        sums[r.value] = _mm512_add_epi32(sums[r.value], exact[c.value + 1][r.value]);
      });
    });
  }

  // out[r] = sums of row r, for ROWS rows `stride` elements apart.
  template <int ROWS>
  static inline void run(const char* block, int inputs, const int16_t* a, size_t stride, float (*out)[kColumns]) {
    __m512 total[ROWS];
    repeat<ROWS>([&](auto r) LLK_ALWAYS { total[r.value] = _mm512_setzero_ps(); });
    for (int k = 0; k < inputs; k += kGroup, block += kGroupBytes) {
      const char* bases[(ROWS + 3) / 4];
      repeat<(ROWS + 3) / 4>([&](auto n) LLK_ALWAYS { bases[n.value] = (const char*)(a + k + 4 * n.value * stride); });
      __m512i sums[ROWS];
      add_group<ROWS>(sums, (const int8_t*)block, bases, stride * sizeof *a);
      const __m512i words = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(block + kScalesAt)));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
      repeat<ROWS>([&](auto r) LLK_ALWAYS {
        total[r.value] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r.value]), scale, total[r.value]);
      });
    }
    repeat<ROWS>([&](auto r) LLK_ALWAYS { _mm512_storeu_ps(out[r.value], total[r.value]); });
  }
};

#elif defined(__AVX2__)

struct Int8Product {
  static constexpr int kMaxRows = 6;

  static LLK_INLINE F8 scales(const int8_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_load_si128((const __m128i*)p)), 16))};
  }

  // low and high += two inputs times 16 outputs. In assembly because a compiler that may reorder these hoists the
  // broadcasts of all rows and then spills the accumulators: 12 + 2 weights + 2 temporaries are all 16 registers.
  static LLK_INLINE void add_pair(__m256i& low, __m256i& high, __m256i w_low, __m256i w_high, const int16_t* two) {
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

  template <int ROWS>
  static inline void run(const char* packed, int inputs, const int16_t* a, size_t stride, float (*out)[kColumns]) {
    constexpr int kAhead = 2 * kGroupBytes;
    const int8_t* block = (const int8_t*)packed;
    for (int r = 0; r < ROWS; r++) memset(out[r], 0, sizeof out[r]);
    for (int k = 0; k < inputs; k += kGroup, block += kGroupBytes, a += kGroup) {
      __m256i exact[ROWS][2];
      repeat<ROWS>([&](auto r) LLK_ALWAYS { exact[r.value][0] = exact[r.value][1] = _mm256_setzero_si256(); });
#pragma GCC unroll 1
      for (int pair = 0; pair < kPairs; pair++) {
        const int8_t* p = block + pair * kPairBytes;
        const __m256i w_low = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)p));
        const __m256i w_high = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(p + 16)));
        if (pair % 2 == 0) __builtin_prefetch((const char*)p + kAhead);
        repeat<ROWS>([&](auto r) LLK_ALWAYS {
          add_pair(exact[r.value][0], exact[r.value][1], w_low, w_high, a + (size_t)r.value * stride + 2 * pair);
        });
      }
      const F8 low = scales(block + kScalesAt), high = scales(block + kScalesAt + 16);
      repeat<ROWS>([&](auto r) LLK_ALWAYS {
        float* sums = out[r.value];
        store(sums, fma({_mm256_cvtepi32_ps(exact[r.value][0])}, low, load(sums)));
        store(sums + 8, fma({_mm256_cvtepi32_ps(exact[r.value][1])}, high, load(sums + 8)));
      });
    }
  }
};

#else

struct Int8Product {
  static constexpr int kMaxRows = 4;

  template <int ROWS>
  static inline void run(const char* packed, int inputs, const int16_t* a, size_t stride, float (*out)[kColumns]) {
    const int8_t* block = (const int8_t*)packed;
    memset(out, 0, sizeof *out * ROWS);
    for (int k = 0; k < inputs; k += kGroup, block += kGroupBytes, a += kGroup) {
      int32_t exact[ROWS][kColumns] = {};
      for (int pair = 0; pair < kPairs; pair++) {
        const int8_t* p = block + pair * kPairBytes;
        for (int r = 0; r < ROWS; r++) {
          const int16_t* two = a + (size_t)r * stride + 2 * pair;
          for (int c = 0; c < kColumns; c++) exact[r][c] += p[2 * c] * two[0] + p[2 * c + 1] * two[1];
        }
      }
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < kColumns; c++) out[r][c] = fmaf((float)exact[r][c], scale_at(block, c), out[r][c]);
    }
  }
};

#endif

}  // namespace
