// products.h - the inner loops of G^T X, the sum over tokens of outer products: one register tile.
//
// Both matrices are packed first: panels of a tile's rows (G) or columns (X), token after token,
// zeros where features or tokens end. A packed word is 4 bytes: a float, or two tokens' bfloat16.
#pragma once

#include <cstdint>

#include "piece_ops/core/dtype.h"

namespace piece_ops::cpu {

// What is done with a tile [rows, columns], its elements one row after another.
struct TileOut {
  bool begins;         // the sums start from 0, else from partial
  bool ends;           // they are complete: scaled, squared and added; else stored to partial
  float* partial;      // unscaled sums of a sample that is not complete
  float scale;         // of the sample's gradient g
  float* square_sums;  // += (scale g)^2, or null
  float* sums;         // += scale g, or null
};

struct Products {
  int64_t rows;
  int64_t columns;
  int64_t step;  // tokens in a packed word
  // Packs consecutive tokens of `width` features into panels, `panel_words` apart.
  void (*pack_rows)(DType dtype, const void* x, int64_t stride, int64_t tokens, int64_t width,
                    uint32_t* out, int64_t panel_words);
  void (*pack_columns)(DType dtype, const void* x, int64_t stride, int64_t tokens, int64_t width,
                       uint32_t* out, int64_t panel_words);
  // Adds `steps` packed words of one panel of each.
  void (*tile)(const uint32_t* rows, const uint32_t* columns, int64_t steps, const TileOut& out);
};

// For bfloat16 matrices, with products of pairs; null where the CPU (or PIECE_OPS_ISA) has none.
const Products* bfloat16_products();

}  // namespace piece_ops::cpu
