// scatter.h - target[indices[s]] = values[s], over many tensors; nothing else is written.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"
#include "piece_ops/core/view.h"

namespace piece_ops {

struct ScatterArgs {
  int64_t count;             // tensors
  const View* targets;       // [count] any dtype
  const IndexView* indices;  // [count]
  const ConstView* values;   // [count] of the target's dtype, or float32 (rounded to nearest even)
};

namespace cpu {
void scatter(const Context& context, const ScatterArgs& args);
}  // namespace cpu

namespace cuda {
Table make_table(const ScatterArgs& args);
void scatter(const Context& context, const DeviceTable& table);
}  // namespace cuda

}  // namespace piece_ops
