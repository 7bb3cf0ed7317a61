// Eight floats as one value. The same operations in the same order on every instruction set, so that the bits agree:
// fused multiply-add only where `fma` is written, maximum and minimum as x86 defines them (the second if unordered).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LLK_ALWAYS __attribute__((always_inline))
#define LLK_INLINE inline LLK_ALWAYS

namespace {

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// f(Constant<0>()), f(Constant<1>()) ... N of them: a loop whose counter is a constant.
template <int N, class F>
LLK_INLINE void repeat(F f) {
  if constexpr (N > 0) {
    repeat<N - 1>(f);
    f(Constant<N - 1>());
  }
}

constexpr float kHalfMax = 65504.f;

LLK_INLINE uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
LLK_INLINE float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
LLK_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t rest = (uint32_t)(h & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return from_bits(sign | (rest + (224u << 23)));
  if (rest >= 0x0400u << 13) return from_bits(sign | (rest + (112u << 23)));
  return from_bits(sign | bits(from_bits(rest + (113u << 23)) - from_bits(113u << 23)));
}
LLK_INLINE uint16_t float_to_half(float x) {
  const uint32_t sign = bits(x) >> 16 & 0x8000;
  const uint32_t rest = bits(x) & 0x7fffffff;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x47800000u) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000u) return (uint16_t)(sign | (bits(from_bits(rest) + 0.5f) - 0x3f000000u));
  return (uint16_t)(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

#if defined(__AVX2__)

struct F8 {
  __m256 v;
};
LLK_INLINE F8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
LLK_INLINE void store(float* p, F8 a) { _mm256_storeu_ps(p, a.v); }
LLK_INLINE F8 splat(float x) { return {_mm256_set1_ps(x)}; }
LLK_INLINE F8 operator+(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
LLK_INLINE F8 operator-(F8 a, F8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
LLK_INLINE F8 operator*(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
LLK_INLINE F8 operator/(F8 a, F8 b) { return {_mm256_div_ps(a.v, b.v)}; }
LLK_INLINE F8 fma(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LLK_INLINE F8 max(F8 a, F8 b) { return {_mm256_max_ps(a.v, b.v)}; }
LLK_INLINE F8 min(F8 a, F8 b) { return {_mm256_min_ps(a.v, b.v)}; }
LLK_INLINE F8 magnitude(F8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
// a * 2^n for a whole n whose result is a normal number
LLK_INLINE F8 scale_by_power(F8 a, F8 n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shifted))};
}
// lanes first <= lane < last of a, the others of b
LLK_INLINE F8 lanes(F8 a, F8 b, int first, int last) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i from = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1));
  const __m256i in = _mm256_and_si256(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(in))};
}
LLK_INLINE F8 load_half(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
LLK_INLINE void store_half(uint16_t* p, F8 a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
LLK_INLINE void store_int16(int16_t* p, F8 a) {
  const __m256i wide = _mm256_cvtps_epi32(a.v);
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128((__m128i*)p, packed);
}
LLK_INLINE float sum(F8 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#else

struct F8 {
  float v[8];
};
#define LLK_EACH(expression)                  \
  F8 out;                                     \
  for (int i = 0; i < 8; i++) out.v[i] = (expression); \
  return out
LLK_INLINE F8 load(const float* p) { LLK_EACH(p[i]); }
LLK_INLINE void store(float* p, F8 a) { memcpy(p, a.v, sizeof a.v); }
LLK_INLINE F8 splat(float x) { LLK_EACH(x); }
LLK_INLINE F8 operator+(F8 a, F8 b) { LLK_EACH(a.v[i] + b.v[i]); }
LLK_INLINE F8 operator-(F8 a, F8 b) { LLK_EACH(a.v[i] - b.v[i]); }
LLK_INLINE F8 operator*(F8 a, F8 b) { LLK_EACH(a.v[i] * b.v[i]); }
LLK_INLINE F8 operator/(F8 a, F8 b) { LLK_EACH(a.v[i] / b.v[i]); }
LLK_INLINE F8 fma(F8 a, F8 b, F8 c) { LLK_EACH(fmaf(a.v[i], b.v[i], c.v[i])); }
LLK_INLINE F8 max(F8 a, F8 b) { LLK_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
LLK_INLINE F8 min(F8 a, F8 b) { LLK_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
LLK_INLINE F8 magnitude(F8 a) { LLK_EACH(fabsf(a.v[i])); }
LLK_INLINE int32_t nearest(float x) {
  return x >= -2147483648.f && x < 2147483648.f ? (int32_t)lrintf(x) : INT32_MIN;
}
LLK_INLINE F8 scale_by_power(F8 a, F8 n) { LLK_EACH(from_bits(bits(a.v[i]) + ((uint32_t)nearest(n.v[i]) << 23))); }
LLK_INLINE F8 lanes(F8 a, F8 b, int first, int last) { LLK_EACH(i >= first && i < last ? a.v[i] : b.v[i]); }
LLK_INLINE F8 load_half(const uint16_t* p) { LLK_EACH(half_to_float(p[i])); }
LLK_INLINE void store_half(uint16_t* p, F8 a) {
  for (int i = 0; i < 8; i++) p[i] = float_to_half(a.v[i]);
}
LLK_INLINE void store_int16(int16_t* p, F8 a) {
  for (int i = 0; i < 8; i++) {
    const int32_t n = nearest(a.v[i]);
    p[i] = (int16_t)(n > 32767 ? 32767 : n < -32768 ? -32768 : n);
  }
}
LLK_INLINE float sum(F8 a) {
  const float s0 = (a.v[0] + a.v[4]) + (a.v[2] + a.v[6]), s1 = (a.v[1] + a.v[5]) + (a.v[3] + a.v[7]);
  return s0 + s1;
}
#undef LLK_EACH

#endif

LLK_INLINE float largest(F8 a) {
  float lane[8];
  store(lane, a);
  const auto larger = [](float x, float y) { return x > y ? x : y; };
  return larger(larger(larger(lane[0], lane[4]), larger(lane[2], lane[6])),
                larger(larger(lane[1], lane[5]), larger(lane[3], lane[7])));
}

}  // namespace
