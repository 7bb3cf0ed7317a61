// Rows of activations times packed matrices, a tile of rows and one block of 16 outputs at a time.
#pragma once
#include "product_float.h"
#include "product_int8.h"

namespace {

// The left side of a product: what the kind of the matrix asks for.
struct Activations {
  const float* plain;         // [rows][width], for fp16 and fp32 weights
  const int16_t* quantized;   // [rows][width], for int8 weights
  const float* scales;        // [rows], of `quantized`
  int rows, width;
  const float* lowered = nullptr;  // [rows][kLoweredWidth]: see lora.h
};

template <class Product, int ROWS, class T>
__attribute__((noinline)) void tile(const char* block, int inputs, const T* a, size_t stride, float (*out)[kColumns]) {
  Product::template run<ROWS>(block, inputs, a, stride, out);
}

template <class Product, class T, int ROWS = Product::kMaxRows>
inline void tile_of(int rows, const char* block, int inputs, const T* a, size_t stride, float (*out)[kColumns]) {
  if (rows == ROWS)
    tile<Product, ROWS>(block, inputs, a, stride, out);
  else if constexpr (ROWS > 1)
    tile_of<Product, T, ROWS - 1>(rows, block, inputs, a, stride, out);
}

template <class Product, class T, class Store>
inline void multiply_tiles(const llk_matrix& m, int first, int last, const T* a, int all, Store store_row) {
  const int tiles = (all + Product::kMaxRows - 1) / Product::kMaxRows;
  for (int block = first; block < last; block++)
    for (int t = 0; t < tiles; t++) {
      const int from = all * t / tiles, rows = all * (t + 1) / tiles - from;
      alignas(64) float sums[Product::kMaxRows][kColumns];
      tile_of<Product>(rows, block_of(m, block), m.inputs, a + (size_t)from * m.inputs, (size_t)m.inputs, sums);
      for (int r = 0; r < rows; r++) store_row(from + r, block, sums[r]);
    }
}

// Blocks first <= block < last of a product; `epilogue(row, block, low, high)` gets 16 outputs of a row at a time.
template <class Epilogue>
inline void multiply(const llk_matrix& m, int first, int last, const Activations& a, Epilogue epilogue) {
  const auto plain = [&](int row, int block, const float* sums) { epilogue(row, block, load(sums), load(sums + 8)); };
  switch (m.kind) {
    case LLK_FP16: return multiply_tiles<FloatProduct<HalfWeights>>(m, first, last, a.plain, a.rows, plain);
    case LLK_FP32: return multiply_tiles<FloatProduct<SingleWeights>>(m, first, last, a.plain, a.rows, plain);
    default:
      multiply_tiles<Int8Product>(m, first, last, a.quantized, a.rows, [&](int row, int block, const float* sums) {
        const F8 scale = splat(a.scales[row]);
        epilogue(row, block, load(sums) * scale, load(sums + 8) * scale);
      });
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
