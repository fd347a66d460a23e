// slots.h - what gather, scatter and sparse_adamw share: tiles of selected positions.
//
// A slot costs a 32-byte sector of its own wherever its position lies, so what counts is how many
// are on their way at once: each lane has kUnroll positions in flight, 64 warps an SM.
#pragma once

#include "tiles.h"

namespace piece_ops::cuda {

constexpr int64_t kSlotTile = 1024;
constexpr int kUnroll = 4;

// The first columns of their tables; check_indices reads these only.
constexpr int kIndices = 0;
constexpr int kBound = 1;  // elements of the tensor that the positions point into
constexpr int kFirstOwnColumn = 2;

// body(first, end, position) for every kUnroll slots of this lane: first, first + 32, ..., those
// below end; position[u] is the position of slot first + 32 u. All of them are read before the body
// runs. Slots count from the tensor's first one.
template <class Body>
__device__ __forceinline__ void for_each_slot(const Tile& tile, const int64_t* indices, Body body) {
  const int64_t end = tile.begin + tile.n;
  for (int64_t first = tile.begin + lane_of_warp(); first < end; first += kUnroll * kWarp) {
    int64_t position[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t s = first + u * kWarp;
      position[u] = s < end ? __ldcs(indices + s) : 0;
    }
    body(first, end, position);
  }
}

}  // namespace piece_ops::cuda
