// scatter.cu - target[indices[s]] = values[s] over many tensors; nothing else is written.
//
// What       docs/contracts.md, scatter_. Copies bits where the dtypes agree, else rounds float32
//            to nearest even (math/rounding.h).
// Algorithm  one launch; one warp takes tiles of 1024 slots; a lane reads 4 positions, then moves 4
//            values. (All 4 values before the first store cost 24 registers on sm_90 and half the
//            warps on sm_100; nobody waits for a store.) Positions differ, so no two lanes write
//            one element; stores of 2 bytes leave the neighbours in the sector alone.
// Traffic    per slot: index 8, value 2..8, target one 32-byte sector read and written back.
//            8 M slots into bfloat16 from float32: 0.61 GB, predicted 0.15 ms on an H200 (4.0
//            TB/s); measured there: 5.2 M slots in 40 tensors 0.32 ms.
// Scratch    the table.  Determinism  bitwise.
// Limits     positions were checked before (check_indices). unchecked: nothing changed them since.
#include "element.h"
#include "pairs.h"
#include "piece_ops/ops/scatter.h"

namespace piece_ops::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) scatter_kernel(DeviceTable table) {
  for_each_pair(
      table,
      [](const Slots& slots, auto* target, const auto* values) {
        slots.each([&](int, int64_t s, int64_t position) { target[position] = values[s]; });
      },
      [](const Slots& slots, void* target, DType dtype, const float* values) {
        slots.each([&](int, int64_t s, int64_t position) {
          store_float(target, dtype, position, __ldcs(values + s));
        });
      });
}

}  // namespace

Table make_table(const ScatterArgs& args) {
  return make_pair_table(args.count, args.indices, args.targets, args.values);
}

void scatter(const Context& context, const DeviceTable& table) {
  use_device(context);
  launch_over_tiles(scatter_kernel, context, table);
}

}  // namespace piece_ops::cuda
