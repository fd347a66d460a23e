// sparse_adamw.h - AdamW on the selected coordinates of many tensors, masters in float32.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"
#include "piece_ops/core/view.h"
#include "piece_ops/math/adamw.h"

namespace piece_ops {

struct SparseAdamwArgs {
  int64_t count;              // tensors
  const View* weights;        // [count] dense, float32, bfloat16 or float16
  const IndexView* indices;   // [count] k positions each
  float* const* values;       // [count] k floats each: the masters
  const ConstView* grads;     // [count] k numbers, or as many as the weight: gathered at indices
  float* const* exp_avgs;     // [count] k floats each
  float* const* exp_avg_sqs;  // [count] k floats each
  AdamwFactors factors;
};

namespace cpu {
void sparse_adamw(const Context& context, const SparseAdamwArgs& args);
}  // namespace cpu

namespace cuda {
Table make_table(const SparseAdamwArgs& args);  // the factors are not looked at
void sparse_adamw(const Context& context, const DeviceTable& table, const AdamwFactors& factors);
}  // namespace cuda

}  // namespace piece_ops
