// fp32 activations times one packed block of 16 fp16 or fp32 outputs: an output is one chain of fused multiply-adds in
// order of the inputs. So the bits of a row depend neither on the rows beside it nor on the instruction set.
#pragma once
#include "packed.h"

namespace {

#if defined(__AVX512F__)

struct HalfWeights {
  typedef uint16_t type;
  static LLK_INLINE __m512 get(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
};
struct SingleWeights {
  typedef float type;
  static LLK_INLINE __m512 get(const float* p) { return _mm512_loadu_ps(p); }
};

template <class W>
struct FloatProduct {
  static constexpr int kMaxRows = 16;

  // sum += the input at OFFSET of the row's present bytes times 16 outputs; assembly as in the int8 product.
  template <int ROW, int OFFSET>
  static LLK_INLINE void add(__m512& sum, __m512 w, const char* const* bases, size_t stride, size_t triple) {
#define LLK_ADD(address)                                                                                   \
  asm("vfmadd231ps %c[offset]" address "%{1to16%}, %[w], %[sum]"                                           \
      : [sum] "+v"(sum)                                                                                    \
      : [w] "v"(w), [base] "r"(bases[ROW / 4]), [stride] "r"(stride), [triple] "r"(triple), [offset] "i"(OFFSET), \
        "m"(*(const char(*)[])bases[ROW / 4]))
    if constexpr (ROW % 4 == 0) LLK_ADD("(%[base])");
    if constexpr (ROW % 4 == 1) LLK_ADD("(%[base],%[stride])");
    if constexpr (ROW % 4 == 2) LLK_ADD("(%[base],%[stride],2)");
    if constexpr (ROW % 4 == 3) LLK_ADD("(%[base],%[triple])");
#undef LLK_ADD
  }

  // out[r] = sums of row r, for ROWS rows `stride` elements apart.
  template <int ROWS>
  static inline void run(const char* packed, int inputs, const float* a, size_t stride, float (*out)[kColumns]) {
    typedef typename W::type T;
    constexpr int kUnroll = 4, kLines = kUnroll * kColumns * (int)sizeof(T) / 64, kAhead = 2048, kBases = (ROWS + 3) / 4;
    const T* p = (const T*)packed;
    const size_t bytes = stride * sizeof *a;
    const char* at[kBases];
    __m512 total[ROWS];
    repeat<kBases>([&](auto n) LLK_ALWAYS { at[n.value] = (const char*)(a + 4 * n.value * stride); });
    repeat<ROWS>([&](auto r) LLK_ALWAYS { total[r.value] = _mm512_setzero_ps(); });
    for (const T* end = p + (size_t)inputs * kColumns; p < end; p += kUnroll * kColumns) {
      repeat<kLines>([&](auto n) LLK_ALWAYS { __builtin_prefetch((const char*)p + kAhead + 64 * n.value); });
      repeat<kUnroll>([&](auto u) LLK_ALWAYS {
        const __m512 w = W::get(p + u.value * kColumns);
        repeat<ROWS>([&](auto r) LLK_ALWAYS { add<r.value, 4 * u.value>(total[r.value], w, at, bytes, 3 * bytes); });
      });
      repeat<kBases>([&](auto n) LLK_ALWAYS { at[n.value] += kUnroll * sizeof *a; });
    }
    repeat<ROWS>([&](auto r) LLK_ALWAYS { _mm512_storeu_ps(out[r.value], total[r.value]); });
  }
};

#else

struct HalfWeights {
  typedef uint16_t type;
  static LLK_INLINE F8 get(const uint16_t* p) { return load_half(p); }
};
struct SingleWeights {
  typedef float type;
  static LLK_INLINE F8 get(const float* p) { return load(p); }
};

template <class W>
struct FloatProduct {
#if defined(__AVX2__)
  static constexpr int kMaxRows = 6;
#else
  static constexpr int kMaxRows = 4;
#endif

  template <int ROWS>
  static inline void run(const char* packed, int inputs, const float* a, size_t stride, float (*out)[kColumns]) {
    const typename W::type* p = (const typename W::type*)packed;
    F8 low[ROWS], high[ROWS];
    repeat<ROWS>([&](auto r) LLK_ALWAYS { low[r.value] = high[r.value] = splat(0.f); });
#pragma GCC unroll 1
    for (int k = 0; k < inputs; k++, p += kColumns) {
      const F8 w_low = W::get(p), w_high = W::get(p + 8);
      __builtin_prefetch((const char*)p + 2048);
      repeat<ROWS>([&](auto r) LLK_ALWAYS {
        const F8 x = splat(a[r.value * stride + k]);
        low[r.value] = fma(x, w_low, low[r.value]);
        high[r.value] = fma(x, w_high, high[r.value]);
      });
    }
    repeat<ROWS>([&](auto r) LLK_ALWAYS {
      store(out[r.value], low[r.value]);
      store(out[r.value] + 8, high[r.value]);
    });
  }
};

#endif

}  // namespace
