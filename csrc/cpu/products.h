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
  int64_t step;   // tokens in a packed word
  int64_t steps;  // packed words of a panel's row or column: a multiple of it, the last ones zeros
  // Packs consecutive tokens of `width` features into panels, `panel_words` apart.
  void (*pack_rows)(DType dtype, const void* x, int64_t stride, int64_t tokens, int64_t width,
                    uint32_t* out, int64_t panel_words);
  void (*pack_columns)(DType dtype, const void* x, int64_t stride, int64_t tokens, int64_t width,
                       uint32_t* out, int64_t panel_words);
  // Adds `steps` packed words of one panel of each. What is to be done with the sums may be left to
  // the next call, which gets this one's `out` as `previous` (else null), and at last to finish().
  void (*tile)(const uint32_t* rows, const uint32_t* columns, int64_t steps, const TileOut& out,
               const TileOut* previous);
  // Null where nothing is left to it.
  void (*finish)(const TileOut& previous);
  // Called by a thread before and after its calls of tile(); may be null.
  void (*begin)();
  void (*end)();
};

}  // namespace piece_ops::cpu
