// gather.cpp - values[s] = source[indices[s]], widened to float32 if asked.
//
// Traffic    per slot: index 8 (streamed), source one 64-byte line (random), value 2..8.
//            Bound: memory latency. Scratch none. Determinism: bitwise.
#include "piece_ops/ops/gather.h"

#include "element.h"
#include "indices.h"
#include "parallel.h"

namespace piece_ops::cpu {

void gather(const Context& context, const GatherArgs& args) {
  for (int64_t t = 0; t < args.count; ++t) {
    check_indices("gather", "indices", t, args.indices[t], args.sources[t].n);
  }
  const std::vector<Tile> tiles =
      make_tiles(args.count, [&](int64_t t) { return args.indices[t].n; }, kSlotTile);
  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  const int threads = usable_threads(context.threads, n_tiles, elements_of(tiles));
  parallel_for(threads, n_tiles, 1, [&](int, int64_t i) {
    const Tile& tile = tiles[i];
    const ConstView& source = args.sources[tile.tensor];
    const View& values = args.values[tile.tensor];
    const int64_t* index = args.indices[tile.tensor].data + tile.begin;
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
