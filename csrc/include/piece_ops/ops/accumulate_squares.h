// accumulate_squares.h - square_sums += weight * (g * g) and sums += weight * g, over many tensors.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"
#include "piece_ops/core/view.h"
#include "piece_ops/math/score.h"

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

// The CUDA backend works in two steps: a table of the tensors, which can be kept as long as
// addresses and sizes stay, and launches that read it.
namespace cuda {

// Asks for the largest score of every 32 consecutive elements, taken from the new accumulators:
// maxima[t] has (n + 31) / 32 floats, element c the maximum over elements 32 c .. 32 c + 31 (fewer
// at the tensor's end), NaN if one of them is NaN. -0 counts as +0.
struct ChunkMaxima {
  float* const* maxima = nullptr;  // [count], or null: not wanted
  // kPlain of square_sums; kPieceS of sums, square_sums; kMagnitude of sums; kPieceG of sums,
  // second; kTaylor of square_sums, second; kSnip of sums, second.
  Score score = Score::kPlain;
  const ConstView* second = nullptr;  // [count] float32, bfloat16 or float16, where named above
  float constant = 0.0f;
};
constexpr int64_t kMaximaChunk = 32;

Table make_table(const AccumulateSquaresArgs& args, const ChunkMaxima& maxima);

// report, on the device: [0] the first tensor with a NaN or infinite gradient, or a number above
// every tensor's; [1] how many it has. sticky, on the device, or null: counts the calls that added
// nothing. Two kernels; the second one looks at [0] and adds, or only counts.
void accumulate_squares(const Context& context, const DeviceTable& table, bool has_square_sums,
                        bool has_sums, float weight, const ChunkMaxima& maxima, int64_t* report,
                        int64_t* sticky);

}  // namespace cuda

}  // namespace piece_ops
