// sampled_weight_grad.h - values[s] = sum over tokens t of grad_output[t, i] * input[t, j], for the
// positions indices[s] = i * in + j of a weight [out, in].
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"
#include "piece_ops/core/view.h"

namespace piece_ops {

// The order of the sum, which every backend keeps (docs/contracts.md): blocks of consecutive
// tokens; in a block token t goes to lane t mod 32, in token order; lane l takes lane l + 16, then
// + 8, + 4, + 2, + 1; the blocks' sums are added in order.
constexpr int64_t kSampledBlock = 256;
constexpr int64_t kSampledLanes = 32;

struct SampledWeightGradArgs {
  ConstMatrix grad_output;  // [tokens, out] float32, bfloat16 or float16
  ConstMatrix input;        // [tokens, in] likewise
  IndexView indices;
  float* values;  // [indices.n]
};

namespace cpu {
void sampled_weight_grad(const Context& context, const SampledWeightGradArgs& args);
}  // namespace cpu

namespace cuda {

// For check_indices (ops/device.h).
Table make_table(const SampledWeightGradArgs& args);
// Scratch, on the device, for each block of tokens that is worked on at the same time; a multiple
// of 16.
int64_t sampled_weight_grad_bytes(const SampledWeightGradArgs& args);
// All pointers are the device's; scratch (16-byte aligned) is for so many blocks, at least one. The
// indices were checked before.
void sampled_weight_grad(const Context& context, const SampledWeightGradArgs& args, void* scratch,
                         int64_t blocks_at_once);

}  // namespace cuda

}  // namespace piece_ops
