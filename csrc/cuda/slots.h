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

// kUnroll slots of one lane: first, first + 32, ..., as far as they are below end.
struct Slots {
  int64_t first;
  int64_t end;
  int64_t position[kUnroll];  // in the tensor; all read before the first is used

  // body(u, slot, position): reads of one call are all on their way before the next call begins.
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t s = first + u * kWarp;
      if (s < end) body(u, s, position[u]);
    }
  }
};

// body(slots) for all slots of the tile; they count from the tensor's first one.
template <class Body>
__device__ __forceinline__ void for_each_slot(const DeviceTable& table, const Tile& tile,
                                              Body body) {
  const int64_t* indices = table_pointer<const int64_t>(table, kIndices, tile.tensor);
  Slots slots;
  slots.end = tile.begin + tile.n;
  for (slots.first = tile.begin + lane_of_warp(); slots.first < slots.end;
       slots.first += kUnroll * kWarp) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t s = slots.first + u * kWarp;
      slots.position[u] = s < slots.end ? __ldcs(indices + s) : 0;
    }
    body(slots);
  }
}

}  // namespace piece_ops::cuda
