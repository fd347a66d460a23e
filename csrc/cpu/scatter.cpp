// scatter.cpp - target[indices[s]] = values[s]; nothing else is written.
//
// Traffic    per slot: index 8, value 2..8 (streamed), target one 64-byte line read and written.
//            Bound: memory latency. Scratch none. Determinism: bitwise, since positions differ.
//
// scatter_two writes two lists in one walk over the targets, a stretch of them at a time: a stretch
// of 512 slots of 0.1 % is 1 MB of bfloat16, 256 pages, whose translations stay in the second-level
// TLB (2048 entries) for the second list. Two times 0.1 % of 135 M weights after 400 MB of other
// work, two threads: about half the time of two scatters. One thread owns a stretch, so that the
// second list wins where both write.
#include "piece_ops/ops/scatter.h"

#include <algorithm>

#include "element.h"
#include "indices.h"

namespace piece_ops::cpu {
namespace {

// Writes n values, of the target's dtype, bit for bit.
void copy_slots(const View& target, const int64_t* index, const void* values, int64_t n) {
  with_bits(target.dtype, [&](auto bits) {
    using Bits = decltype(bits);
    const Bits* from = static_cast<const Bits*>(values);
    Bits* to = static_cast<Bits*>(target.data);
    for (int64_t s = 0; s < n; ++s) to[index[s]] = from[s];
  });
}

const void* slot_address(const ConstView& values, int64_t slot) {
  return static_cast<const char*>(values.data) + slot * size_of(values.dtype);
}

constexpr int64_t kStretch = 512;  // slots of the longer list

}  // namespace

void scatter(const Context& context, const ScatterArgs& args) {
  const auto size = [&](int64_t t) { return args.targets[t].n; };
  for_each_slot_tile(context, "scatter_", args.count, args.indices, size,
                     [&](const Tile& tile, const int64_t* index) {
                       const View& target = args.targets[tile.tensor];
                       const ConstView& values = args.values[tile.tensor];
                       prefetch_positions<true>(target.data, target.dtype, index, tile.n);
                       if (target.dtype == values.dtype) {
                         copy_slots(target, index, slot_address(values, tile.begin), tile.n);
                       } else {
                         const float* from = static_cast<const float*>(values.data) + tile.begin;
                         for (int64_t s = 0; s < tile.n; ++s)
                           store_float(target, index[s], from[s]);
                       }
                     });
}

void check_scatter(const ScatterArgs& args) {
  for (int64_t t = 0; t < args.count; ++t)
    check_indices("scatter_", "indices", t, args.indices[t], args.targets[t].n);
}

void scatter_two(const Context& context, const ScatterArgs& first, const ScatterArgs& second) {
  const auto longer = [&](int64_t t) {
    return first.indices[t].n > second.indices[t].n ? first.indices[t] : second.indices[t];
  };
  const std::vector<Tile> tiles =
      make_tiles(first.count, [&](int64_t t) { return longer(t).n; }, kStretch);
  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  const int threads = usable_threads(context.threads, n_tiles, 2 * elements_of(tiles));
  parallel_for(threads, n_tiles, 4, [&](int, int64_t i) {
    const Tile& tile = tiles[i];
    const View& target = first.targets[tile.tensor];
    // The stretch: from this tile's first position (the target's start) to the next one's.
    const IndexView& cut = longer(tile.tensor);
    const int64_t begin = tile.begin ? cut.data[tile.begin] : 0;
    const int64_t end = tile.begin + tile.n < cut.n ? cut.data[tile.begin + tile.n] : target.n;
    const int64_t* index[2];
    const void* values[2];
    int64_t n[2];
    for (int list = 0; list < 2; ++list) {
      const ScatterArgs& args = list ? second : first;
      const IndexView& all = args.indices[tile.tensor];
      index[list] = std::lower_bound(all.data, all.data + all.n, begin);
      n[list] = std::lower_bound(index[list], all.data + all.n, end) - index[list];
      values[list] = slot_address(args.values[tile.tensor], index[list] - all.data);
      prefetch_positions<true>(target.data, target.dtype, index[list], n[list]);
    }
    for (int list = 0; list < 2; ++list) copy_slots(target, index[list], values[list], n[list]);
  });
}

}  // namespace piece_ops::cpu
