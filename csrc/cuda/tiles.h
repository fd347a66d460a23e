// tiles.h - how a persistent grid walks over the tiles of many tensors: one warp, one tile.
//
// The grid fills the chip once; warp w takes tiles w, w + W, w + 2 W, ... A warp needs nothing from
// its neighbours, so there is no barrier, and 64 resident warps an SM hide each other's look-ups:
// finding the tensor of a tile is a binary search in the prefix column, 8 steps for Llama's 291
// tensors and 14 for 10,000, all hits in L1 or L2, against some 20 us that a tile's bytes take at
// a warp's share of the bandwidth.
#pragma once

#include <algorithm>

#include "gpu.h"
#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"

namespace piece_ops::cuda {

constexpr int kThreads = 256;
constexpr int kWarpsOfBlock = kThreads / kWarp;

__device__ __forceinline__ int64_t table_size(const DeviceTable& table, int64_t t) {
  return __ldg(table.words + table.count + 1 + t);
}
__device__ __forceinline__ int64_t table_word(const DeviceTable& table, int column, int64_t t) {
  return __ldg(table.words + (column + 2) * table.count + 1 + t);
}
template <class T>
__device__ __forceinline__ T* table_pointer(const DeviceTable& table, int column, int64_t t) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(table_word(table, column, t)));
}

// The tensor that a tile belongs to: the last one with prefix[t] <= tile. Empty tensors have the
// same prefix as their successor and are never found.
__device__ __forceinline__ int64_t find_tensor(const DeviceTable& table, int64_t tile) {
  return last_start(table.count, tile, [&](int64_t t) { return __ldg(table.words + t); });
}

struct Tile {
  int64_t number;
  int64_t tensor;
  int64_t begin;
  int64_t n;
};

__device__ __forceinline__ Tile get_tile(const DeviceTable& table, int64_t number,
                                         int64_t tile_size) {
  Tile tile;
  tile.number = number;
  tile.tensor = find_tensor(table, number);
  tile.begin = (number - __ldg(table.words + tile.tensor)) * tile_size;
  const int64_t left = table_size(table, tile.tensor) - tile.begin;
  tile.n = left < tile_size ? left : tile_size;
  return tile;
}

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// body(tile) for every tile of this warp; all lanes call it together.
template <class Body>
__device__ __forceinline__ void for_each_tile(const DeviceTable& table, int64_t tile_size,
                                              Body body) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsOfBlock;
  int64_t number = static_cast<int64_t>(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
  for (; number < table.tiles; number += warps) body(get_tile(table, number, tile_size));
}

// ---- host ---------------------------------------------------------------------------------------

inline cudaStream_t stream_of(const Context& context) {
  return static_cast<cudaStream_t>(context.stream);
}

// Makes the context's device current; the caller's framework restores its own choice.
inline void use_device(const Context& context) {
  PIECE_OPS_CUDA_CHECK(cudaSetDevice(context.device));
}

// Blocks that a multiprocessor of the current device holds at once.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t dynamic_shared_bytes) {
  int resident = 0;
  PIECE_OPS_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads,
                                                                     dynamic_shared_bytes));
  return std::max(resident, 1);
}

// As many blocks as the chip holds at once, at most as there is work for. Call use_device before.
template <class... Parameters>
int64_t persistent_grid(void (*kernel)(Parameters...), int device, int threads,
                        size_t dynamic_shared_bytes, int64_t blocks_of_work) {
  int processors = 0;
  PIECE_OPS_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t fits = int64_t{processors} * resident_blocks(kernel, threads, dynamic_shared_bytes);
  return std::min(fits, std::max<int64_t>(blocks_of_work, 1));
}

// Runs kernel(table, args...) with one warp per tile; nothing if there is no tile.
template <class Kernel, class... Args>
void launch_over_tiles(Kernel kernel, const Context& context, const DeviceTable& table,
                       Args&&... args) {
  if (table.tiles == 0) return;
  const int64_t blocks = (table.tiles + kWarpsOfBlock - 1) / kWarpsOfBlock;
  launch(kernel, persistent_grid(kernel, context.device, kThreads, 0, blocks), kThreads, 0,
         stream_of(context), table, std::forward<Args>(args)...);
}

}  // namespace piece_ops::cuda
