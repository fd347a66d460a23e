// indices.h - ops that follow a caller's positions: the check before, and the loop over slots.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "piece_ops/core/check.h"
#include "piece_ops/core/context.h"
#include "piece_ops/core/view.h"

namespace piece_ops::cpu {

// Throws unless indices are strictly increasing and inside 0 .. n-1: a position out of range would
// write foreign memory, a repeated one would make threads collide. Costs one read of the indices.
inline void check_indices(const char* op, const char* name, int64_t tensor, IndexView indices,
                          int64_t n) {
  int64_t previous = -1;
  for (int64_t s = 0; s < indices.n; ++s) {
    const int64_t i = indices.data[s];
    PIECE_OPS_CHECK(i >= 0 && i < n, "piece_ops.", op, ": ", name, "[", tensor, "] must be in 0..",
                    n - 1, ", got ", i, " at slot ", s);
    PIECE_OPS_CHECK(i > previous, "piece_ops.", op, ": ", name, "[", tensor,
                    "] must be strictly increasing, got ", i, " after ", previous, " at slot ", s);
    previous = i;
  }
}

// Slots cost a cache miss each, so their tiles are smaller than those of dense elements.
constexpr int64_t kSlotTile = 4096;

// Checks the indices of all tensors (tensor t has size(t) elements), then calls
// body(tile, positions of its slots) for tiles of slots, in parallel.
template <class Size, class Body>
void for_each_slot_tile(const Context& context, const char* op, int64_t count,
                        const IndexView* indices, Size size, Body body) {
  for (int64_t t = 0; t < count; ++t) check_indices(op, "indices", t, indices[t], size(t));
  const std::vector<Tile> tiles =
      make_tiles(count, [&](int64_t t) { return indices[t].n; }, kSlotTile);
  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  const int threads = usable_threads(context.threads, n_tiles, elements_of(tiles));
  parallel_for(threads, n_tiles, 1, [&](int, int64_t i) {
    const Tile& tile = tiles[i];
    body(tile, indices[tile.tensor].data + tile.begin);
  });
}

}  // namespace piece_ops::cpu
