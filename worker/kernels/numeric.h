// Element-wise functions, RMS norm, quantization of activations.
#pragma once
#include "simd.h"

namespace {

// e^x to about 1 ulp for -87 <= x <= 88, clamped outside: 2^n p(r) with |r| <= ln(2) / 2 and the Taylor polynomial.
// What is not a number stays so: it is the second operand wherever a value is clamped.
LLK_INLINE F8 exponential(F8 x) {
  x = min(splat(88.f), max(splat(-87.f), x));
  const F8 rounder = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  const F8 n = fma(x, splat(1.44269504f), rounder) - rounder;
  F8 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F8 p = splat(1.f / 5040);
  p = fma(p, r, splat(1.f / 720));
  p = fma(p, r, splat(1.f / 120));
  p = fma(p, r, splat(1.f / 24));
  p = fma(p, r, splat(1.f / 6));
  p = fma(p, r, splat(.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  return scale_by_power(p, n);
}

LLK_INLINE F8 silu(F8 x) { return x / (splat(1.f) + exponential(splat(0.f) - x)); }

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 u)
LLK_INLINE F8 gelu_tanh(F8 x) {
  const F8 u = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
  return x / (splat(1.f) + exponential(splat(-2.f) * u));
}

LLK_INLINE F8 activate(int kind, F8 x) { return kind == 0 ? silu(x) : gelu_tanh(x); }

// cap * tanh(x / cap)
LLK_INLINE F8 softcap(F8 x, float cap) {
  const F8 one = splat(1.f), e = exponential(splat(2.f) * (x / splat(cap)));
  return splat(cap) * (one - splat(2.f) / (e + one));
}

inline float inverse_rms(const float* x, int width, float epsilon) {
  F8 squares = splat(0.f);
  for (int i = 0; i < width; i += 8) squares = fma(load(x + i), load(x + i), squares);
  return 1.f / sqrtf(sum(squares) / (float)width + epsilon);
}

// x [width] times the scale of its RMS and `norm`.
inline void normalize_row(const float* x, const float* norm, float epsilon, int width, float* out) {
  const F8 factor = splat(inverse_rms(x, width, epsilon));
  for (int i = 0; i < width; i += 8) store(out + i, load(x + i) * factor * load(norm + i));
}

// x [width] times the scale of its RMS and `norm` (NULL: as it is), to int16 and one scale, the largest magnitude.
// A scale is not a number if an element is not finite: then everything computed from the row is not a number either.
inline void quantize_row(const float* x, const float* norm, float epsilon, int width, int16_t* quantized, float* scale) {
  const F8 factor = splat(norm ? inverse_rms(x, width, epsilon) : 1.f);
  const auto element = [=](int i) { return norm ? load(x + i) * factor * load(norm + i) : load(x + i); };
  F8 peak = splat(0.f), poison = splat(0.f);
  for (int i = 0; i < width; i += 8) {
    const F8 value = element(i);
    peak = max(peak, magnitude(value));
    poison = fma(value, splat(0.f), poison);
  }
  const float most = largest(peak);
  *scale = most / 32767.f + sum(poison);
  const F8 inverse = splat(most > 1e-30f ? 32767.f / most : 0.f);
  for (int i = 0; i < width; i += 8) store_int16(quantized + i, element(i) * inverse);
}

// x += branch * inverse_rms(branch) * norm
inline void add_normed(float* x, const float* branch, const float* norm, float epsilon, int width) {
  const F8 factor = splat(inverse_rms(branch, width, epsilon));
  for (int i = 0; i < width; i += 8) store(x + i, fma(load(branch + i) * factor, load(norm + i), load(x + i)));
}

}  // namespace
