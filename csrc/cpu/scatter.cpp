// scatter.cpp - target[indices[s]] = values[s]; nothing else is written.
//
// Traffic    per slot: index 8, value 2..8 (streamed), target one 64-byte line read and written.
//            Bound: memory latency. Scratch none. Determinism: bitwise, since positions differ.
#include "piece_ops/ops/scatter.h"

#include "element.h"
#include "indices.h"
#include "parallel.h"

namespace piece_ops::cpu {

void scatter(const Context& context, const ScatterArgs& args) {
  for (int64_t t = 0; t < args.count; ++t) {
    check_indices("scatter_", "indices", t, args.indices[t], args.targets[t].n);
  }
  const std::vector<Tile> tiles =
      make_tiles(args.count, [&](int64_t t) { return args.indices[t].n; }, kSlotTile);
  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  const int threads = usable_threads(context.threads, n_tiles, elements_of(tiles));
  parallel_for(threads, n_tiles, 1, [&](int, int64_t i) {
    const Tile& tile = tiles[i];
    const View& target = args.targets[tile.tensor];
    const ConstView& values = args.values[tile.tensor];
    const int64_t* index = args.indices[tile.tensor].data + tile.begin;
    if (target.dtype == values.dtype) {
      with_bits(target.dtype, [&](auto bits) {
        using Bits = decltype(bits);
        const Bits* from = static_cast<const Bits*>(values.data) + tile.begin;
        Bits* to = static_cast<Bits*>(target.data);
        for (int64_t s = 0; s < tile.n; ++s) to[index[s]] = from[s];
      });
    } else {
      const float* from = static_cast<const float*>(values.data) + tile.begin;
      for (int64_t s = 0; s < tile.n; ++s) store_float(target, index[s], from[s]);
    }
  });
}

}  // namespace piece_ops::cpu
