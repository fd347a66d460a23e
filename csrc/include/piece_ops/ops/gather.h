// gather.h - values[s] = source[indices[s]], over many tensors.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"
#include "piece_ops/core/view.h"

namespace piece_ops {

struct GatherArgs {
  int64_t count;             // tensors
  const ConstView* sources;  // [count] any dtype
  const IndexView* indices;  // [count]
  const View* values;        // [count] indices[t].n each, of the source's dtype or float32
};

namespace cpu {
void gather(const Context& context, const GatherArgs& args);
}  // namespace cpu

namespace cuda {
Table make_table(const GatherArgs& args);
void gather(const Context& context, const DeviceTable& table);
}  // namespace cuda

}  // namespace piece_ops
