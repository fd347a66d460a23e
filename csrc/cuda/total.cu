// total.cu - the sum of all elements of many tensors, in float64, with the bits of the CPU.
//
// What       csrc/cpu/total.cpp fixes the order by the sizes alone: tiles of 64 Ki elements, each
//            summed in 8 interleaved lanes (element i goes to lane i mod 8), lanes 0 to 7 added,
//            and tile sums added in the caller's order. The same order here gives the same bits.
// Algorithm  1. one group of 8 threads takes a tile; thread l adds elements l, l + 8, ... in
//            float64, 16 of them in flight (a group reads whole 32-byte sectors, a warp 4 tiles);
//            2. one block adds the tile sums: 2048 at a time into shared memory, thread 0 adds.
// Traffic    one read. Bound: memory, when there are more tiles than threads can hold (n > 1e9),
//            else the chain of 8192 additions a thread, some 0.1 to 0.2 ms; the second kernel adds
//            16 cycles a tile. Predicted on an H200: 1e9 float32 1.1 ms (read floor 0.93), 8e9 8.6
//            ms; measured at 1e9 1.36 ms.
// Scratch    8 bytes a tile and the table.  Determinism  bitwise, any grid.
#include "element.h"
#include "piece_ops/ops/total.h"
#include "tiles.h"

namespace piece_ops::cuda {

namespace {

constexpr int64_t kTotalTile = 64 * 1024;  // the CPU's, part of the result's definition
constexpr int kLanes = 8;                  // likewise
constexpr int kInFlight = 16;
constexpr int kTensor = 0;
constexpr int kDType = 1;
constexpr int kColumns = 2;

// ---- kernels ------------------------------------------------------------------------------------

// Elements lane, lane + 8, ... of the tile.
template <class Load>
__device__ __forceinline__ double sum_lane(int lane, int64_t n, Load load) {
  double sum = 0.0;
  int64_t i = lane;
  for (; i + (kInFlight - 1) * kLanes < n; i += kInFlight * kLanes) {
    double x[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) x[u] = load(i + u * kLanes);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) sum += x[u];
  }
  for (; i < n; i += kLanes) sum += load(i);
  return sum;
}

__global__ void __launch_bounds__(kThreads) sum_tiles_kernel(DeviceTable table, double* tile_sums) {
  constexpr int kGroups = kThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * kGroups;
  // All groups of a warp go round equally often: the shuffles below need every lane.
  const int64_t rounds = (table.tiles + groups - 1) / groups;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t number = round * groups + group;
    double sum = 0.0;
    if (number < table.tiles) {
      const Tile tile = get_tile(table, number, kTotalTile);
      const void* data = table_pointer<const void>(table, kTensor, tile.tensor);
      const auto dtype = static_cast<DType>(table_word(table, kDType, tile.tensor));
      if (dtype == DType::kFloat64) {
        const double* x = static_cast<const double*>(data) + tile.begin;
        sum = sum_lane(lane, tile.n, [x](int64_t i) { return x[i]; });
      } else {
        with_element(dtype, [&](auto element) {
          using Element = decltype(element);
          const auto* x = static_cast<const typename Element::Bits*>(data) + tile.begin;
          sum = sum_lane(lane, tile.n,
                         [x](int64_t i) { return static_cast<double>(Element::widen(x[i])); });
        });
      }
    }
    double total = 0.0;
    for (int l = 0; l < kLanes; ++l) total += __shfl_sync(kAllLanes, sum, l, kLanes);
    if (number < table.tiles && lane == 0) tile_sums[number] = total;
  }
}

constexpr int kChunk = 2048;

__global__ void __launch_bounds__(kThreads)
    add_tile_sums_kernel(const double* tile_sums, int64_t n, double* result) {
  __shared__ double chunk[kChunk];
  double sum = 0.0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t left = n - begin;
    const int count = static_cast<int>(left < kChunk ? left : kChunk);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      chunk[i] = tile_sums[begin + i];
    }
    __syncthreads();  // the chunk is complete before thread 0 reads it
    if (threadIdx.x == 0) {
#pragma unroll 16
      for (int i = 0; i < count; ++i) sum += chunk[i];
    }
    __syncthreads();  // thread 0 has read it before the next one overwrites it
  }
  if (threadIdx.x == 0) *result = sum;
}

}  // namespace

// ---- launcher -----------------------------------------------------------------------------------

Table make_table(const TotalArgs& args) {
  return build_table(
      args.count, kTotalTile, kColumns, [&](int64_t t) { return args.tensors[t].n; },
      [&](int column, int64_t t) -> int64_t {
        return column == kTensor ? address_word(args.tensors[t].data)
                                 : static_cast<int64_t>(args.tensors[t].dtype);
      });
}

void total(const Context& context, const DeviceTable& table, double* tile_sums, double* result) {
  use_device(context);
  if (table.tiles > 0) {
    constexpr int64_t groups_of_block = kThreads / kLanes;
    const int64_t blocks = (table.tiles + groups_of_block - 1) / groups_of_block;
    launch(sum_tiles_kernel, persistent_grid(sum_tiles_kernel, context.device, kThreads, 0, blocks),
           kThreads, 0, stream_of(context), table, tile_sums);
  }
  launch(add_tile_sums_kernel, 1, kThreads, 0, stream_of(context), tile_sums, table.tiles, result);
}

}  // namespace piece_ops::cuda
