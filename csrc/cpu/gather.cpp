// gather.cpp - values[s] = source[indices[s]], widened to float32 if asked.
//
// Traffic    per slot: index 8 (streamed), source one 64-byte line (random), value 2..8.
//            Bound: memory latency. Scratch none. Determinism: bitwise.
#include "piece_ops/ops/gather.h"

#include "element.h"
#include "indices.h"

namespace piece_ops::cpu {

void gather(const Context& context, const GatherArgs& args) {
  const auto size = [&](int64_t t) { return args.sources[t].n; };
  for_each_slot_tile(context, "gather", args.count, args.indices, size,
                     [&](const Tile& tile, const int64_t* index) {
                       const ConstView& source = args.sources[tile.tensor];
                       const View& values = args.values[tile.tensor];
                       if (source.dtype == values.dtype) {
                         with_bits(source.dtype, [&](auto bits) {
                           using Bits = decltype(bits);
                           const Bits* from = static_cast<const Bits*>(source.data);
                           Bits* to = static_cast<Bits*>(values.data) + tile.begin;
                           for (int64_t s = 0; s < tile.n; ++s) to[s] = from[index[s]];
                         });
                       } else {
                         float* to = static_cast<float*>(values.data) + tile.begin;
                         for (int64_t s = 0; s < tile.n; ++s) to[s] = load_float(source, index[s]);
                       }
                     });
}

}  // namespace piece_ops::cpu
