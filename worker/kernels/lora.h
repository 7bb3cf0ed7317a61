// Adapters: y += up (down x) for the rows that have one. A row's input is lowered to its adapter's rank where it is
// quantized, and lifted into the epilogues of the products. All sums have one order, whatever rows share a step:
// lowering runs four chains over the inputs, lifting two over the rank.
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

// An adapter's matrices are read once per step: nothing brings them into the cache but this.
LLK_INLINE void fetch(const uint16_t* from, int count) {
  for (int i = 0; i < count; i += 32) __builtin_prefetch(from + i);
}

// Eight outputs of each row: down [inputs][8] times x [inputs].
template <int ROWS>
LLK_INLINE void lower_eight(const uint16_t* down, const float* const* x, int inputs, float* const* out) {
  constexpr int kChains = 4, kAhead = 1536;
  F8 chain[ROWS][kChains];
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < kChains; c++) chain[r][c] = splat(0.f);
  for (int k = 0; k < inputs; k += kChains) {
    __builtin_prefetch(down + (size_t)k * 8 + kAhead);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; c++) {
      const F8 weights = load_half(down + (size_t)(k + c) * 8);
#pragma GCC unroll 3
      for (int r = 0; r < ROWS; r++) chain[r][c] = fma(weights, splat(x[r][k + c]), chain[r][c]);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) store(out[r], (chain[r][0] + chain[r][1]) + (chain[r][2] + chain[r][3]));
}

// x [ROWS][inputs] to lowered [ROWS][count][LLK_MOST_RANK].
template <int ROWS>
inline void lower(const llk_adapter& adapter, Lowering to, const float* const* x, int inputs, float* const* lowered) {
  float* out[ROWS];
  for (int i = 0; i < to.count; i++) {
    const uint16_t* down = adapter.layer[to.layer].down[to.target + i];
    if (!down) continue;
    for (int rank = 0; rank < adapter.rank; rank += 8) {
      for (int r = 0; r < ROWS; r++) out[r] = lowered[r] + i * LLK_MOST_RANK + rank;
      lower_eight<ROWS>(down + (size_t)rank * inputs, x, inputs, out);
    }
  }
}

// The first weights that a stage reads of an adapter; what follows is fetched on the way.
inline void fetch_first(const llk_adapter& adapter, Lowering to) {
  for (int i = 0; i < to.count; i++)
    if (const uint16_t* down = adapter.layer[to.layer].down[to.target + i]) return fetch(down, 1536);
}

inline void lower_rows(const llk_adapter& adapter, Lowering to, int rows, const float* const* x, int inputs,
                       float* const* lowered) {
  static_assert(kLoweredRows == 3, "one case each");
  if (rows == 3) return lower<3>(adapter, to, x, inputs, lowered);
  if (rows == 2) return lower<2>(adapter, to, x, inputs, lowered);
  lower<1>(adapter, to, x, inputs, lowered);
}

// Eight outputs of a projection that are lifted: those from 8 * eighth on. `slot` is the place of the target among those
// that share their input.
struct Lift {
  int target, slot, eighth;
};

inline void lift_eight(const llk_adapter_layer& l, int rank, const float* lowered, Lift at, F8& sum) {
  const uint16_t* up = l.up[at.target];
  if (!up) return;
  up += (size_t)at.eighth * rank * 8;
  fetch(up + (size_t)rank * 16, rank * 8);
  lowered += at.slot * LLK_MOST_RANK;
  F8 even = splat(0.f), odd = splat(0.f);
  for (int r = 0; r < rank; r += 8)
#pragma GCC unroll 4
    for (int i = r; i < r + 8; i += 2) {
      even = fma(load_half(up + i * 8), splat(lowered[i]), even);
      odd = fma(load_half(up + i * 8 + 8), splat(lowered[i + 1]), odd);
    }
  sum = fma(even + odd, splat(l.factor[at.target]), sum);
}

// Adds to 16 outputs of a row.
template <class Activations>
LLK_INLINE void lift(const State& s, int layer, const Activations& a, int row, Lift at_low, Lift at_high, F8& low,
                     F8& high) {
  const llk_adapter* adapter = adapter_of(s, row);
  if (__builtin_expect(!adapter, 1)) return;
  lift_eight(adapter->layer[layer], adapter->rank, a.lowered + (size_t)row * kLoweredWidth, at_low, low);
  lift_eight(adapter->layer[layer], adapter->rank, a.lowered + (size_t)row * kLoweredWidth, at_high, high);
}

}  // namespace
