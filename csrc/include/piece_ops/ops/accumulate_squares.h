// accumulate_squares.h - square_sums += weight * (g * g) and sums += weight * g, over many tensors.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/view.h"

namespace piece_ops {

struct AccumulateSquaresArgs {
  int64_t count;              // tensors
  const ConstView* grads;     // [count] float32, bfloat16 or float16
  float* const* square_sums;  // [count] addresses of n floats each, or null: leave out
  float* const* sums;         // [count] likewise, or null
  float weight;
};

// The first tensor with a NaN or infinite gradient, and how many it has; tensor -1: none.
struct NonFinite {
  int64_t tensor = -1;
  int64_t count = 0;
};

namespace cpu {
// Adds everything, or, when any gradient is not finite, nothing.
NonFinite accumulate_squares(const Context& context, const AccumulateSquaresArgs& args);
}  // namespace cpu

}  // namespace piece_ops
