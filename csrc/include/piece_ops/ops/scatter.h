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

// Throws unless the indices are those of a scatter: increasing, inside their targets.
void check_scatter(const ScatterArgs& args);

// Two scatters into the same targets in one pass: where both write, the second stays. For those who
// keep their lists: checked before by check_scatter, values of the target's dtype.
void scatter_two(const Context& context, const ScatterArgs& first, const ScatterArgs& second);
}  // namespace cpu

namespace cuda {
Table make_table(const ScatterArgs& args);
void scatter(const Context& context, const DeviceTable& table);
}  // namespace cuda

}  // namespace piece_ops
