// accumulate_per_sample_squares.h - square_sums += sum over samples n of (scale_n G_n^T X_n)^2.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/dtype.h"
#include "piece_ops/ops/accumulate_squares.h"

namespace piece_ops {

// [tokens, features], features consecutive, `stride` elements from a token to the next.
struct TokenMatrix {
  const void* data;
  int64_t features;
  int64_t stride;
  DType dtype;  // float32, bfloat16 or float16
};

struct AccumulatePerSampleSquaresArgs {
  TokenMatrix grad_output;  // G
  TokenMatrix input;        // X
  int64_t samples;
  const int64_t* offsets;  // [samples + 1] sample n: tokens offsets[n] .. offsets[n + 1] - 1
  const float* scales;     // [samples] or null: all 1
  float* square_sums;      // [G's features, X's features] or null: leave out
  float* sums;             // likewise; += sum over samples of scale_n G_n^T X_n
  bool* overflowed;        // or null: set where an accumulator is not finite afterwards
};

namespace cpu {
// Adds everything, or nothing when a number is not finite: tensor 0 is G, 1 is X, -1 is none.
NonFinite accumulate_per_sample_squares(const Context& context,
                                        const AccumulatePerSampleSquaresArgs& args);
}  // namespace cpu

}  // namespace piece_ops
