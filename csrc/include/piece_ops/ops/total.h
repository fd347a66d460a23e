// total.h - the sum of all elements of many tensors, in float64 and in one fixed order.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"
#include "piece_ops/core/view.h"

namespace piece_ops {

struct TotalArgs {
  int64_t count;             // tensors
  const ConstView* tensors;  // [count] any dtype
};

namespace cpu {
double total(const Context& context, const TotalArgs& args);
}  // namespace cpu

namespace cuda {
Table make_table(const TotalArgs& args);
// tile_sums: table.tiles doubles of scratch; result: one double. Both on the device.
void total(const Context& context, const DeviceTable& table, double* tile_sums, double* result);
}  // namespace cuda

}  // namespace piece_ops
