// Adapters: y += up (down x) for the rows that have one. A row's input is lowered to its adapter's rank where it is
// quantized, and lifted into the epilogues of the products. All sums have one order, whatever rows share a step:
// lowering runs eight chains over the inputs, lifting two over the rank.
#pragma once
#include "simd.h"
#include "state.h"

namespace {

enum Target { kToQ, kToK, kToV, kToOut, kToGate, kToUp, kToDown };  // as in llk_adapter_layer

// Projections of a layer that share their input: `count` of them from `target` on.
struct Lowering {
  int layer, target, count;
};

LLK_INLINE const llk_adapter* adapter_of(const State& s, int row) {
  return s.args->adapter && s.args->adapter[row] >= 0 ? s.args->adapters + s.args->adapter[row] : nullptr;
}

// Eight outputs: down [inputs][8] times x [inputs].
LLK_INLINE F8 lower_eight(const float* down, const float* x, int inputs) {
  constexpr int kChains = 8;
  F8 chain[kChains];
  for (int c = 0; c < kChains; c++) chain[c] = splat(0.f);
  for (int k = 0; k < inputs; k += kChains)
#pragma GCC unroll 8
    for (int c = 0; c < kChains; c++) chain[c] = fma(load(down + (size_t)(k + c) * 8), splat(x[k + c]), chain[c]);
  return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

// x [inputs] to lowered [count][LLK_MOST_RANK].
inline void lower(const llk_adapter& adapter, Lowering to, const float* x, int inputs, float* lowered) {
  for (int i = 0; i < to.count; i++, lowered += LLK_MOST_RANK)
    if (const float* down = adapter.layer[to.layer].down[to.target + i])
      for (int r = 0; r < adapter.rank; r += 8) store(lowered + r, lower_eight(down + (size_t)r * inputs, x, inputs));
}

// Adds to the outputs 8 * eighth .. of a row; `slot` is the target's place among those that share their input.
template <class Activations>
LLK_INLINE void lift(const State& s, int layer, int target, int slot, const Activations& a, int row, int eighth,
                      F8& sum) {
  const llk_adapter* adapter = adapter_of(s, row);
  if (__builtin_expect(!adapter, 1)) return;
  const float* up = adapter->layer[layer].up[target];
  if (!up) return;
  up += (size_t)eighth * adapter->rank * 8;
  const float* lowered = a.lowered + (size_t)row * kLoweredWidth + slot * LLK_MOST_RANK;
  F8 even = splat(0.f), odd = splat(0.f);
  for (int r = 0; r < adapter->rank; r += 2) {
    even = fma(load(up + r * 8), splat(lowered[r]), even);
    odd = fma(load(up + r * 8 + 8), splat(lowered[r + 1]), odd);
  }
  sum = sum + (even + odd);
}

}  // namespace
