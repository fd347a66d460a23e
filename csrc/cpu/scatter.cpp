// scatter.cpp - target[indices[s]] = values[s]; nothing else is written.
//
// Traffic    per slot: index 8, value 2..8 (streamed), target one 64-byte line read and written.
//            Bound: memory latency. Scratch none. Determinism: bitwise, since positions differ.
#include "piece_ops/ops/scatter.h"

#include "element.h"
#include "indices.h"

namespace piece_ops::cpu {

void scatter(const Context& context, const ScatterArgs& args) {
  const auto size = [&](int64_t t) { return args.targets[t].n; };
  for_each_slot_tile(context, "scatter_", args.count, args.indices, size,
                     [&](const Tile& tile, const int64_t* index) {
                       const View& target = args.targets[tile.tensor];
                       const ConstView& values = args.values[tile.tensor];
                       if (target.dtype == values.dtype) {
                         with_bits(target.dtype, [&](auto bits) {
                           using Bits = decltype(bits);
                           const Bits* from = static_cast<const Bits*>(values.data) + tile.begin;
                           Bits* to = static_cast<Bits*>(target.data);
                           for (int64_t s = 0; s < tile.n; ++s) to[index[s]] = from[s];
                         });
                       } else {
                         const float* from = static_cast<const float*>(values.data) + tile.begin;
                         for (int64_t s = 0; s < tile.n; ++s)
                           store_float(target, index[s], from[s]);
                       }
                     });
}

}  // namespace piece_ops::cpu
