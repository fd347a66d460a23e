// select_topk_emit.cu - from the kept and the threshold to positions, in the caller's order.
//
// What       indices[0 .. k): what is above the threshold, and the first ties in the caller's
//            order; counts for each tensor; the report.
// Algorithm  1. share: 8 lanes a tile count what of its kept is above the threshold and what equals
//               it (if the threshold is the bound, the filter's counts say so); a block has 256
//               tiles and writes their sum.
//            2. scan: the last block of share turns the sums of all groups into what comes before
//               each; ties at the threshold that are needed: quota = k - all above.
//            3. emit: a block scans its 256 tiles: a tile's positions go to
//                   above before it + min(ties before it, quota),
//               and it gives as many of its ties as the quota still holds. Then 8 lanes a tile
//               copy.
//            4. reread: tiles that must give ties equal to the bound, which are not in the list, or
//               all tiles of a dense selection, are read again, a block a tile, ballots and a scan.
//            5. report, by the same launch: counts are differences of the tiles' places; a thread
//               a tensor.
//            Three launches, in which no block waits for another. share and emit go round eight times;
//            a thread a tile looks up all that the rounds need first, so that a round waits for its
//            keys, not for a chain of five loads (0.2 to 0.6 us each: some 0.01 ms in all).
// Traffic    8 (12) bytes a kept score twice, 8 bytes a selected one, 40 bytes a tile: 0.3 % of
//            float32 at k = 0.1 %, most of it in L2. Reread: 4 bytes for each score of a tile that
//            gives ties at the bound, at most one read of everything. Bound: latency and launches;
//            dense: HBM. H200, float32, k = 0.1 %: 1e9 0.03 ms, 8e9 0.15 ms.
// Scratch    28 bytes a tile, 16 a group.
// Determinism  all places are sums of counts in the tiles' order.
#include "select_topk_load.h"

namespace piece_ops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // of a tile, in share and emit
static_assert(kThreads == kGroupTiles, "emit scans one tile a thread");
static_assert(kSparseSlots < 1 << 16, "two counts in 32 bits");

// Exclusive scans over the groups, in place, by the last block; the quota. A thread has a run of
// groups: one pass for its sum, one for its places.
template <class K>
PIECE_OPS_DEVICE void scan_groups(int64_t groups, const TopkFound<K>& found) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ int64_t above_sums[kWarps];
  __shared__ int64_t tie_sums[kWarps];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t run = (groups + kThreads - 1) / kThreads;
  const int64_t begin = run * threadIdx.x;
  const int64_t end = begin + run < groups ? begin + run : groups;
  int64_t above = 0;
  int64_t ties = 0;
#pragma unroll 4
  for (int64_t g = begin; g < end; ++g) {
    above += found.group_above[g];
    ties += found.group_ties[g];
  }
  const int64_t above_upto = warp_scan(above, lane);
  const int64_t ties_upto = warp_scan(ties, lane);
  if (lane == kWarp - 1) {
    above_sums[warp] = above_upto;
    tie_sums[warp] = ties_upto;
  }
  __syncthreads();  // the warps' sums are there
  int64_t above_before = above_upto - above;
  int64_t ties_before = ties_upto - ties;
  int64_t all_above = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) {
      above_before += above_sums[w];
      ties_before += tie_sums[w];
    }
    all_above += above_sums[w];
  }
#pragma unroll 4
  for (int64_t g = begin; g < end; ++g) {
    const int64_t above_here = found.group_above[g];
    const int64_t ties_here = found.group_ties[g];
    found.group_above[g] = above_before;
    found.group_ties[g] = ties_before;
    above_before += above_here;
    ties_before += ties_here;
  }
  if (threadIdx.x == 0) found.state->quota = found.k - all_above;
}

template <class K>
__global__ void __launch_bounds__(kThreads)
    share_kernel(TopkTable table, const TopkSearch<K>* bound, int64_t groups, TopkFound<K> found) {
  __shared__ unsigned long long warp_sums[kThreads / kWarp];
  __shared__ uint32_t counts[kGroupTiles];
  __shared__ int64_t starts[kGroupTiles];
  if (found.state->status != TopkReport::kFound) return;  // all threads alike
  const K threshold_key = found.threshold->bound();
  const bool at_bound = threshold_key == bound->bound();
  {  // one tile a thread: loads of all rounds at once
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kGroupTiles + threadIdx.x;
    counts[threadIdx.x] = tile < table.tiles ? found.counts[tile] : 0;
    starts[threadIdx.x] = tile < table.tiles ? found.starts[tile] : 0;
  }
  __syncthreads();  // counts and starts are there
  const int lane = threadIdx.x % kLanes;
  unsigned long long sum = 0;  // above << 32 | ties; a group has at most 2^23 of each
  for (int first = 0; first < kGroupTiles; first += kThreads / kLanes) {
    const int local = first + threadIdx.x / kLanes;
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kGroupTiles + local;
    const bool exists = tile < table.tiles;
    uint32_t chosen = counts[local];
    if (!at_bound) {
      const uint32_t kept = chosen >> 16;
      const K* keys = found.keys + starts[local];
      chosen = 0;
      for (uint32_t j = lane; j < kept; j += kLanes) {
        const K key = keys[j];
        chosen += key > threshold_key ? 1u << 16 : key == threshold_key ? 1u : 0u;
      }
#pragma unroll
      for (int delta = kLanes / 2; delta; delta /= 2) {
        chosen += __shfl_xor_sync(kAllLanes, chosen, delta);
      }
    }
    if (exists && lane == 0) {
      found.chosen[tile] = chosen;
      sum += static_cast<unsigned long long>(chosen >> 16) << 32 | (chosen & 0xffffu);
    }
  }
#pragma unroll
  for (int delta = kWarp / 2; delta; delta /= 2) sum += __shfl_xor_sync(kAllLanes, sum, delta);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();  // the warps' sums are there
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) sum += warp_sums[w];
    found.group_above[blockIdx.x] = static_cast<int64_t>(sum >> 32);
    found.group_ties[blockIdx.x] = static_cast<int64_t>(sum & 0xffffffffu);
  }
  if (is_last_block(&found.state->ticket)) scan_groups(groups, found);
}

template <class K>
__global__ void __launch_bounds__(kThreads)
    emit_kernel(TopkTable table, const TopkSearch<K>* bound, TopkFound<K> found, int64_t* indices) {
  __shared__ unsigned long long warp_sums[kThreads / kWarp];
  // What is copied of each tile from the list: how many are looked at, from where; the tile's first
  // element; the place; ties that are wanted.
  __shared__ uint32_t kept[kGroupTiles];
  __shared__ int64_t starts[kGroupTiles];
  __shared__ int64_t begins[kGroupTiles];
  __shared__ int64_t outs[kGroupTiles];
  __shared__ uint32_t shares[kGroupTiles];
  if (found.state->status != TopkReport::kFound) return;  // all threads alike
  const K threshold_key = found.threshold->bound();
  const bool at_bound = threshold_key == bound->bound();

  {  // one tile a thread: where its positions go, how many ties it gives
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kGroupTiles + threadIdx.x;
    const bool exists = tile < table.tiles;
    const uint32_t chosen = exists ? found.chosen[tile] : 0;
    const unsigned long long own =
        static_cast<unsigned long long>(chosen >> 16) << 32 | (chosen & 0xffffu);
    const int lane = threadIdx.x % kWarp;
    unsigned long long before = warp_scan(own, lane);
    if (lane == kWarp - 1) warp_sums[threadIdx.x / kWarp] = before;
    __syncthreads();  // the warps' sums are there
    before -= own;
    for (unsigned w = 0; w < threadIdx.x / kWarp; ++w) before += warp_sums[w];
    const int64_t above_before = found.group_above[blockIdx.x] + static_cast<int64_t>(before >> 32);
    const int64_t ties_before =
        found.group_ties[blockIdx.x] + static_cast<int64_t>(before & 0xffffffffu);
    const int64_t quota = found.state->quota;
    const int64_t left = quota > ties_before ? quota - ties_before : 0;
    const uint32_t ties = chosen & 0xffffu;
    const uint32_t share = left < ties ? static_cast<uint32_t>(left) : ties;
    const int64_t out = above_before + (ties_before < quota ? ties_before : quota);
    if (exists) {
      found.outs[tile] = out;
      found.shares[tile] = share;
    }
    const bool is_reread = !found.store || (at_bound && share);
    const bool is_copied = !is_reread && (chosen >> 16 || share);
    kept[threadIdx.x] = is_copied ? found.counts[tile] >> 16 : 0;
    starts[threadIdx.x] = is_copied ? found.starts[tile] : 0;
    begins[threadIdx.x] = is_copied ? table.tile_begin(tile, table.tile_tensors[tile]) : 0;
    outs[threadIdx.x] = out;
    shares[threadIdx.x] = share;
  }
  __syncthreads();  // what is copied is there

  const int lane = threadIdx.x % kLanes;
  const int first_lane = threadIdx.x % kWarp - lane;
  for (int first = 0; first < kGroupTiles; first += kThreads / kLanes) {
    const int local = first + threadIdx.x / kLanes;
    const uint32_t n = kept[local];
    const int64_t start = starts[local];
    const int64_t begin = begins[local];
    int64_t out = outs[local];
    uint32_t ties_left = shares[local];
    // The four tiles of a warp go on until the longest one is done: the votes need all lanes.
    for (uint32_t base = 0; __any_sync(kAllLanes, base < n); base += kLanes) {
      const uint32_t j = base + lane;
      const K key = j < n ? found.keys[start + j] : K{0};
      const int64_t slot = j < n ? found.slots[start + j] : 0;  // on its way with the key
      const bool is_tie = j < n && key == threshold_key;
      const unsigned ties = __ballot_sync(kAllLanes, is_tie) >> first_lane & 0xffu;
      const bool gives =
          is_tie && static_cast<uint32_t>(__popc(ties & lanes_below(lane))) < ties_left;
      const uint32_t count = static_cast<uint32_t>(__popc(ties));
      ties_left -= count < ties_left ? count : ties_left;
      const bool is_chosen = (j < n && key > threshold_key) || gives;
      const unsigned lanes = __ballot_sync(kAllLanes, is_chosen) >> first_lane & 0xffu;
      if (is_chosen) indices[out + __popc(lanes & lanes_below(lane))] = begin + slot;
      out += __popc(lanes);
    }
  }
}

// The report, and what each tensor gives: the differences of the tiles' places. A thread a tensor.
template <class K>
PIECE_OPS_DEVICE void tell(const TopkTable& table, const TopkFound<K>& found, int64_t* counts,
                           TopkReport* report) {
  using T = std::conditional_t<sizeof(K) == 8, double, float>;
  const TopkState& state = *found.state;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (first == 0) {
    TopkReport out{};
    out.status = state.status;
    out.kept = static_cast<int64_t>(state.kept);
    out.ties = static_cast<int64_t>(state.ties);
    out.nan_tensor = -1;
    out.check = table.check ? *table.check : kNothingWrong;
    if (state.status == TopkReport::kNan) {
      out.nan_tensor = table.count - static_cast<int64_t>(state.first_nan);
      out.nan_count = static_cast<int64_t>(found.nans[out.nan_tensor]);
    } else if (state.status == TopkReport::kFound) {
      out.threshold = static_cast<double>(from_key<T>(found.threshold->bound()));
      out.ties_kept = state.quota;
    }
    *report = out;
  }
  if (state.status != TopkReport::kFound) return;
  for (int64_t t = first; t < table.count; t += stride) {
    const int64_t begin = table.first_tile(t);
    const int64_t end = table.first_tile(t + 1);
    const int64_t from = begin == table.tiles ? found.k : found.outs[begin];
    const int64_t to = end == table.tiles ? found.k : found.outs[end];
    counts[t] = to - from;
  }
}

template <TopkInput kInput, class K>
__global__ void __launch_bounds__(kTileThreads<ScoreOf<kInput>>,
                                  512 / kTileThreads<ScoreOf<kInput>>)
    reread_kernel(TopkTable table, TopkFormula formula, const TopkSearch<K>* bound,
                  TopkFound<K> found, int64_t* indices, int64_t* counts, TopkReport* report) {
  using T = ScoreOf<kInput>;
  constexpr int kWarps = kTileWarps<T>;
  constexpr int kCount = kPerLane<T>;
  __shared__ uint32_t warp_chosen[2][kWarps];  // above << 16 | ties, of this round and the last one
  tell(table, found, counts, report);
  if (found.state->status != TopkReport::kFound) return;  // all threads alike
  const K threshold_key = found.threshold->bound();
  if (found.store && threshold_key != bound->bound()) return;  // all threads alike
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int round = 0;
  for (int64_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    const uint32_t share = found.shares[tile];
    if (share == 0 && (found.store || found.chosen[tile] >> 16 == 0)) continue;
    const int64_t tensor = table.tile_tensors[tile];
    const TopkRow& row = table.rows[tensor];
    const Excluded excluded = excluded_of(table, row, tile, tensor);
    const int64_t tile_begin = table.tile_begin(tile, tensor);
    int64_t above_before = found.outs[tile];  // before the round: with the ties of earlier tiles
    uint32_t ties_before = 0;
    with_width<kInput>(row, [&](auto width) {
      constexpr int V = decltype(width)::value;
      for (int64_t begin = tile_begin; begin < tile_begin + table.slots && begin < row.n;
           begin += kTileSlots) {
        const int64_t part_begin = begin + warp * kPartSlots<T>;
        T x[kCount];
        const uint32_t valid = load_part<kInput, V>(row, formula, part_begin, lane, x);
        uint32_t above = 0;
        uint32_t ties = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const K key = to_key(x[j]);
          const bool exists = valid >> j & 1u;
          above |= static_cast<uint32_t>(exists && key > threshold_key) << j;
          ties |= static_cast<uint32_t>(exists && key == threshold_key) << j;
        }
        if (excluded.any()) {
          above &= ~excluded_bits<V>(excluded, above, part_begin, lane);
          ties &= ~excluded_bits<V>(excluded, ties, part_begin, lane);
        }
        const uint32_t own =
            __reduce_add_sync(kAllLanes, static_cast<uint32_t>(__popc(above)) << 16 |
                                             static_cast<uint32_t>(__popc(ties)));
        if (lane == 0) warp_chosen[round][warp] = own;
        __syncthreads();  // all counts are there; and those of the round before last have been read
        uint32_t before = 0;
        uint32_t all = 0;
        for (int w = 0; w < kWarps; ++w) {
          if (w < warp) before += warp_chosen[round][w];
          all += warp_chosen[round][w];
        }
        round ^= 1;
        int64_t above_at = above_before + (before >> 16);
        uint32_t ties_at = ties_before + (before & 0xffffu);
#pragma unroll 1  // few tiles come here: registers are worth more than the loop
        for (int g = 0; g < kCount; g += V) {
          constexpr uint32_t kGroup = (1u << V) - 1;
          const uint32_t mine = above >> g & kGroup;
          const uint32_t mine_ties = ties >> g & kGroup;
          if (!__any_sync(kAllLanes, (mine | mine_ties) != 0)) continue;
          int64_t above_here = above_at;
          uint32_t ties_here = ties_at;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const unsigned above_lanes = __ballot_sync(kAllLanes, mine >> v & 1u);
            const unsigned tie_lanes = __ballot_sync(kAllLanes, mine_ties >> v & 1u);
            above_here += __popc(above_lanes & lanes_below(lane));
            ties_here += static_cast<uint32_t>(__popc(tie_lanes & lanes_below(lane)));
            above_at += __popc(above_lanes);
            ties_at += static_cast<uint32_t>(__popc(tie_lanes));
          }
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const bool is_above = mine >> v & 1u;
            const bool is_tie = mine_ties >> v & 1u;
            if (is_above || (is_tie && ties_here < share)) {
              indices[above_here + (ties_here < share ? ties_here : share)] =
                  part_begin + part_slot<V>(g + v, lane);
            }
            above_here += is_above;
            ties_here += is_tie;
          }
        }
        above_before += all >> 16;
        ties_before += all & 0xffffu;
      }
    });
  }
}

}  // namespace

template <class K>
void launch_emit(const TopkLaunch& to, const TopkTable& table, const TopkSearch<K>* bound,
                 const TopkFound<K>& found, int64_t* indices, int64_t* counts, TopkReport* report) {
  using T = std::conditional_t<sizeof(K) == 8, double, float>;
  const int64_t groups = (table.tiles + kGroupTiles - 1) / kGroupTiles;
  launch(share_kernel<K>, groups, kThreads, 0, to.stream, table, bound, groups, found);
  launch(emit_kernel<K>, groups, kThreads, 0, to.stream, table, bound, found, indices);
  const int64_t most = int64_t{to.multiprocessors} * 8;
  const auto start = [&](auto kernel) {
    launch(kernel, table.tiles < most ? table.tiles : most, kTileThreads<T>, 0, to.stream, table,
           to.formula, bound, found, indices, counts, report);
  };
  if constexpr (sizeof(K) == 8) {
    start(reread_kernel<TopkInput::kDouble, K>);
  } else {
    start(to.input == TopkInput::kOne   ? reread_kernel<TopkInput::kOne, K>
          : to.input == TopkInput::kTwo ? reread_kernel<TopkInput::kTwo, K>
                                        : reread_kernel<TopkInput::kHash, K>);
  }
}

#define PIECE_OPS_INSTANTIATE(K)                                                          \
  template void launch_emit<K>(const TopkLaunch&, const TopkTable&, const TopkSearch<K>*, \
                               const TopkFound<K>&, int64_t*, int64_t*, TopkReport*);
PIECE_OPS_INSTANTIATE(uint32_t)
PIECE_OPS_INSTANTIATE(uint64_t)
#undef PIECE_OPS_INSTANTIATE

}  // namespace piece_ops::cuda
