// Layout of packed weights: blocks of 16 outputs; in a block, for each group of 64 inputs, 32 pairs of inputs
// ([pair][output][2] int8) and then 16 bfloat16 scales. One block is one stream in memory; a vector lane is an output.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

namespace {

constexpr int kGroup = LLK_GROUP, kColumns = LLK_COLUMNS, kPairs = kGroup / 2, kPairBytes = kColumns * 2;
constexpr int kScalesAt = kGroup * kColumns, kGroupBytes = kScalesAt + kColumns * 2;

inline int blocks_of(const llk_matrix& m) { return (m.outputs + kColumns - 1) / kColumns; }
inline const int8_t* block_of(const llk_matrix& m, int block) {
  return m.data + (size_t)block * (m.inputs / kGroup) * kGroupBytes;
}
inline float scale_at(const int8_t* group, int column) {
  uint16_t upper;
  memcpy(&upper, group + kScalesAt + column * 2, 2);
  const uint32_t word = (uint32_t)upper << 16;
  float scale;
  memcpy(&scale, &word, 4);
  return scale;
}
inline int weight_at(const int8_t* group, int column, int k) {
  return group[k / 2 * kPairBytes + column * 2 + (k & 1)];
}

// One output's weights as floats, times `factor`: [inputs].
inline void unpack_output(const llk_matrix& m, int output, float factor, float* out) {
  const int8_t* group = block_of(m, output / kColumns);
  for (int first = 0; first < m.inputs; first += kGroup, group += kGroupBytes) {
    const float scale = scale_at(group, output % kColumns);
    for (int k = 0; k < kGroup; k++) out[first + k] = scale * (float)weight_at(group, output % kColumns, k) * factor;
  }
}

}  // namespace
