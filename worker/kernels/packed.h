// Layouts of packed weights: blocks of 16 outputs, each block one stream in memory, a vector lane an output.
//   int8: for each group of 64 inputs 32 pairs of inputs ([pair][output][2] int8) and then 16 bfloat16 scales.
//   fp16, fp32: [input][output].
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"
#include "simd.h"

namespace {

constexpr int kGroup = LLK_GROUP, kColumns = LLK_COLUMNS, kPairs = kGroup / 2, kPairBytes = kColumns * 2;
constexpr int kScalesAt = kGroup * kColumns, kGroupBytes = kScalesAt + kColumns * 2;

inline int blocks_of(const llk_matrix& m) { return (m.outputs + kColumns - 1) / kColumns; }
inline size_t block_bytes(int kind, int inputs) {
  if (kind == LLK_INT8) return (size_t)inputs / kGroup * kGroupBytes;
  return (size_t)inputs * kColumns * (kind == LLK_FP16 ? 2 : 4);
}
inline const char* block_of(const llk_matrix& m, int block) {
  return (const char*)m.data + (size_t)block * block_bytes(m.kind, m.inputs);
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

inline void unpack_int8(const int8_t* group, int inputs, int column, float factor, float* out) {
  for (int first = 0; first < inputs; first += kGroup, group += kGroupBytes) {
    const float scale = scale_at(group, column);
    for (int k = 0; k < kGroup; k++) out[first + k] = scale * (float)weight_at(group, column, k) * factor;
  }
}

// One output's weights as floats, times `factor`: [inputs].
inline void unpack_output(const llk_matrix& m, int output, float factor, float* out) {
  const char* block = block_of(m, output / kColumns);
  const int column = output % kColumns;
  if (m.kind == LLK_INT8) return unpack_int8((const int8_t*)block, m.inputs, column, factor, out);
  for (int k = 0; k < m.inputs; k++) {
    const size_t at = (size_t)k * kColumns + column;
    out[k] = (m.kind == LLK_FP16 ? half_to_float(((const uint16_t*)block)[at]) : ((const float*)block)[at]) * factor;
  }
}

}  // namespace
