// select_topk_filter.cu - the one read of all scores: keeps what exceeds the bound, counts what
// equals it.
//
// What       For each tile: its (key, slot) above the bound, in rising slots; how many equal the
//            bound. NaN are counted for each tensor, when they are to be reported.
// Algorithm  A block takes a tile of 4096 slots, each of its warps a quarter (float64: an eighth); the
//            tiles after it are on their way into shared memory meanwhile (select_topk_ring.h):
//            1. all of a lane's scores from shared memory into registers, and the next copies into
//               their places; one comparison a score, !(x < bound), which NaN passes as well; one
//               reduction tells the warp which of its groups of 128 (256) scores have one. Few do.
//               PIECE-S and PIECE-G are ruled out by a product (select_topk_quick.h), and only
//               what is left is divided.
//            2. of these: a bit for each score above the bound, equal to it, or NaN.
//               Excluded positions are looked up for scores above the bound only; the ties among
//               them are subtracted afterwards, by a look at the tile's excluded entries.
//            3. the warps' counts meet in shared memory, at the one barrier of a tile; ballots give
//               every kept score its place there, so that a share is in order.
//            4. shares of up to 32 tiles, 1024 scores, gather before one atomic add reserves room for
//               all of them and they are copied out; a larger share goes to its place at once. (With
//               an atomic add and a second barrier for every tile, and without the ring, 1e9 took
//               1.38 ms on an H200, 2.9 TB/s.)
//            Batches lie in the order of the atomic adds. Nothing depends on it: the tile says where
//            its share is, and the output's order is that of the tiles (select_topk_emit.cu). No
//            block waits for another. What does not fit the room is counted, not written; verify,
//            by the last block to end, then calls for another round.
// Traffic    read the scores once (4, 2 or 8 bytes; with a second input those of both), 4 bytes a
//            tile of map; write 6 (10) bytes a kept score, 12 bytes a tile: 0.07 % of float32.
//            Bound: HBM. In flight: 32 KiB a block (16-bit types: 16), whatever is judged meanwhile;
//            160 KiB a multiprocessor of sm_90 and sm_100 (two inputs 128, float64 96), 128 of sm_80,
//            64 of sm_120. By Little's law the bus of an H200 needs 35. Its 132 multiprocessors each
//            get 16 KiB in 0.5 us at 4.3 TB/s, so a block has 2.5 us to judge a tile. Instructions,
//            where a warp keeps one of its 1024 scores: 13 a float32 score (counted in the machine
//            code of sm_90), of 27 that the bus leaves time for; estimated for 16-bit types 14 of 14,
//            for PIECE-S of two float32 20 of 55.
//            Predicted for an H200, k = 0.1 %, 1e9 scores: float32 0.94 ms; 16-bit types 0.6 (the bus
//            0.47, instructions as much); two float32 inputs 1.9. Compiled and emulated, not run on a
//            GPU. The kernel before the ring took 1.11 ms, float32 (2026-11-28): probably the bus
//            drained while its tiles were judged.
// Scratch    6 (10) bytes a kept score, up to 2 k + n / 128 + 4096 of them; 12 bytes a tile.
// Determinism  counts and shares are exact; the place of a share is not repeatable and not used.
// Limits     a tile's counts fit 16 bits; positions 64.
#include "select_topk_quick.h"
#include "select_topk_ring.h"
#include "select_topk_verify.h"
#include "tiles.h"

namespace piece_ops::cuda {

namespace {

// Blocks a multiprocessor that must fit by their registers: few enough that nothing spills. Five of
// one input where shared memory holds five (228 KiB: sm_90 and sm_100; sm_80 holds 4, sm_120 2).
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int kBlocksOfOne = 5;
#else
constexpr int kBlocksOfOne = 4;
#endif
template <TopkInput kInput>
constexpr int kMinBlocks = kInput == TopkInput::kOne      ? kBlocksOfOne
                           : kInput == TopkInput::kTwo    ? 4
                           : kInput == TopkInput::kDouble ? 3
                                                          : 5;

// Shares of several tiles, gathered in shared memory: one atomic add reserves the room of all. A
// share larger than a batch is written to its place at once.
constexpr int kBatchTiles = 32;
constexpr uint32_t kBatchKept = 1024;
constexpr int kMaxWarps = 8;

template <class K>
struct Batch {
  K keys[kBatchKept];
  uint16_t slots[kBatchKept];
  int64_t tiles[kBatchTiles];
  uint32_t offsets[kBatchTiles];
  unsigned long long start;
  unsigned long long large_start;  // of a share larger than a batch
  uint32_t counts[2 * kMaxWarps];  // of each warp in this tile and, by turns, in the last one
};

// Writes the batch where there is room for it; the block's threads call this together.
template <class K>
__device__ __forceinline__ void write_batch(Batch<K>* batch, int tiles, uint32_t kept,
                                            const TopkFound<K>& found) {
  if (threadIdx.x == 0) {
    batch->start = kept ? atomicAdd(&found.state->kept, static_cast<unsigned long long>(kept)) : 0;
  }
  __syncthreads();  // the start is there, and all that was staged
  const unsigned long long start = batch->start;
  for (int i = threadIdx.x; i < tiles; i += blockDim.x) {
    found.starts[batch->tiles[i]] = static_cast<int64_t>(start + batch->offsets[i]);
  }
  if (start + kept <= static_cast<uint64_t>(found.room)) {
    for (uint32_t i = threadIdx.x; i < kept; i += blockDim.x) {
      found.keys[start + i] = batch->keys[i];
      found.slots[start + i] = batch->slots[i];
    }
  }
  __syncthreads();  // the batch has been read
}

// How a score compares with the bound: by value, a third of the instructions, where the bound is a
// float32 score and no NaN; else (first digits of a key that no score has, or nothing at all; float64,
// whose registers would not suffice) by its key.
template <class T>
struct ByValue {
  T bound;
  PIECE_OPS_DEVICE bool is_above(T x) const { return x > bound; }
  PIECE_OPS_DEVICE bool is_equal(T x) const { return x == bound; }
};
template <class T>
struct ByKey {
  Key<T> bound;
  PIECE_OPS_DEVICE bool is_above(T x) const { return to_key(x) > bound; }
  PIECE_OPS_DEVICE bool is_equal(T x) const { return to_key(x) == bound; }
};

template <TopkInput kInput, class K>
__global__ void __launch_bounds__(kTileThreads<ScoreOf<kInput>>, kMinBlocks<kInput>)
    filter_kernel(TopkTable table, TopkFormula formula, const TopkSearch<K>* search,
                  TopkFound<K> found) {
  using T = ScoreOf<kInput>;
  constexpr int kWarps = kTileWarps<T>;
  static_assert(kWarps <= kMaxWarps, "counts of all warps have their place");
  constexpr int kCount = kPerLane<T>;
  __shared__ Batch<K> batch;
  PIECE_OPS_DYNAMIC_SHARED(unsigned char, stages);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  if (table.is_broken()) return;  // all threads alike
  Ring<kInput> ring(table, stages);
  const K bound_key = search->bound();
  const T bound = from_key<T>(bound_key);  // NaN if no score has this key: then all groups have one
  const bool by_value = sizeof(T) == 4 && bound_key != 0 && to_key(bound) == bound_key;

  int turn = 0;
  int batch_tiles = 0;  // the same for all threads, likewise batch_kept
  uint32_t batch_kept = 0;
  for (int64_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    const int64_t tensor = ring.part().tensor();
    const TopkRow& row = table.rows[tensor];

    with_width<kInput>(row, [&](auto width) {
      constexpr int V = decltype(width)::value;
      constexpr uint32_t kGroup = (1u << V) - 1;
      T x[kCount];
      float second[kSeconds<kInput>];
      const bool is_whole = ring.part().is_whole();
      const uint32_t valid = ring.template read<V>(table, formula, tile, x, second);
      const Excluded excluded = excluded_of(table, row, tile, tensor);
      uint32_t above = 0;  // bit j: x[j] is kept
      uint32_t tied = 0;
      uint32_t nan = 0;
      uint32_t maybe = 0;  // bit j, j a multiple of V: one of x[j .. j + V - 1] may reach the bound
      const auto ask = [&](auto may_reach) {
#pragma unroll
        for (int g = 0; g < kCount; g += V) {
          bool any = false;
#pragma unroll
          for (int j = g; j < g + V; ++j) any = any || may_reach(j);
          maybe |= static_cast<uint32_t>(any) << g;
        }
        maybe = __reduce_or_sync(kAllLanes, maybe);
      };
      bool is_asked = false;
      if constexpr (kInput == TopkInput::kTwo) {
        const auto ask_quickly = [&](auto quick) {
          ask([&](int j) { return quick.may_reach(x[j], second[j]); });
#pragma unroll
          for (int g = 0; g < kCount; g += V) {
            if (!(maybe >> g & 1u)) continue;
#pragma unroll
            for (int j = g; j < g + V; ++j) x[j] = quick.score(x[j], second[j]);
          }
          is_asked = true;
        };
        if (is_whole && formula.score == Score::kPieceS) {
          ask_quickly(QuickBound<Score::kPieceS>(formula, bound));
        } else if (is_whole && formula.score == Score::kPieceG) {
          ask_quickly(QuickBound<Score::kPieceG>(formula, bound));
        }
      }
      if (!is_asked) {
        if (is_whole) evaluate<kInput>(formula, second, x);
        ask([&](int j) { return !(x[j] < bound); });
      }
      const auto judge = [&](auto compare) {
#pragma unroll
        for (int g = 0; g < kCount; g += V) {
          if (!(maybe >> g & 1u)) continue;
#pragma unroll
          for (int j = g; j < g + V; ++j) {
            above |= static_cast<uint32_t>(compare.is_above(x[j])) << j;
            tied |= static_cast<uint32_t>(compare.is_equal(x[j])) << j;
            nan |= static_cast<uint32_t>(x[j] != x[j]) << j;
          }
        }
      };
      if (by_value) {
        judge(ByValue<T>{bound});
      } else {
        judge(ByKey<T>{bound_key});
      }
      above &= valid;
      int ties = __popc(tied & valid);
      uint32_t nans = static_cast<uint32_t>(__popc(nan & valid));
      if (excluded.any()) {
        above &= ~excluded_bits<V>(excluded, above, part_begin<T>(row, tile), lane);
        for (int64_t e = excluded.begin + threadIdx.x; e < excluded.end; e += blockDim.x) {
          ties -= to_key(score_at<kInput>(row, formula, excluded.list[e])) == bound_key;
        }
      }
      if (found.nans != nullptr && __any_sync(kAllLanes, nans != 0)) {
        nans = __reduce_add_sync(kAllLanes, nans);
        if (lane == 0) {
          atomicAdd(found.nans + tensor, static_cast<unsigned long long>(nans));
          atomicMax(&found.state->first_nan, static_cast<unsigned long long>(table.count - tensor));
        }
      }

      // Sums modulo 2^32 (2^16 of ties): one warp's ties may be below zero, the tile's are not.
      const uint32_t kept_here = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(__popc(above)));
      const uint32_t ties_here = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(ties));
      if (lane == 0)
        batch.counts[turn * kMaxWarps + warp] = kept_here << 16 | (ties_here & 0xffffu);
      __syncthreads();  // counts of all warps are there
      uint32_t before_warp = 0;
      uint32_t kept = 0;
      uint32_t all_ties = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const uint32_t counts = batch.counts[turn * kMaxWarps + w];
        if (w < warp) before_warp += counts >> 16;
        kept += counts >> 16;
        all_ties += counts;
      }
      all_ties &= 0xffffu;
      turn ^= 1;
      if (threadIdx.x == 0) {
        if (all_ties) atomicAdd(&found.state->ties, static_cast<unsigned long long>(all_ties));
        if (!found.store) atomicAdd(&found.state->kept, static_cast<unsigned long long>(kept));
        found.counts[tile] = kept << 16 | all_ties;
      }
      if (!found.store) return;  // nothing but the counts
      K* keys = batch.keys + batch_kept;
      uint16_t* slots = batch.slots + batch_kept;
      bool fits = true;
      if (kept > kBatchKept) {
        if (threadIdx.x == 0) {
          batch.large_start = atomicAdd(&found.state->kept, static_cast<unsigned long long>(kept));
          found.starts[tile] = static_cast<int64_t>(batch.large_start);
        }
        __syncthreads();  // the start is there; it changes behind the next tile's barrier only
        const unsigned long long start = batch.large_start;
        fits = start + kept <= static_cast<uint64_t>(found.room);
        keys = found.keys + start;
        slots = found.slots + start;
      } else {
        if (batch_kept + kept > kBatchKept || batch_tiles == kBatchTiles) {
          write_batch(&batch, batch_tiles, batch_kept, found);
          batch_tiles = 0;
          batch_kept = 0;
          keys = batch.keys;
          slots = batch.slots;
        }
        if (threadIdx.x == 0) {
          batch.tiles[batch_tiles] = tile;
          batch.offsets[batch_tiles] = batch_kept;
        }
        ++batch_tiles;
        batch_kept += kept;
      }
      if (kept_here == 0 || !fits) return;
      uint32_t at = before_warp;
      const uint32_t of_warp = __reduce_or_sync(kAllLanes, above);
#pragma unroll
      for (int g = 0; g < kCount; g += V) {
        if ((of_warp >> g & kGroup) == 0) continue;
        const uint32_t mine = above >> g & kGroup;
        int before = 0;  // kept scores of lower lanes, then those of this lane
        int all = 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const unsigned lanes = __ballot_sync(kAllLanes, mine >> v & 1u);
          before += __popc(lanes & lanes_below(lane));
          all += __popc(lanes);
        }
        uint32_t place = at + static_cast<uint32_t>(before);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (!(mine >> v & 1u)) continue;
          keys[place] = to_key(x[g + v]);
          slots[place] = static_cast<uint16_t>(warp * kPartSlots<T> + part_slot<V>(g + v, lane));
          ++place;
        }
        at += static_cast<uint32_t>(all);
      }
    });
  }
  if (batch_tiles > 0) write_batch(&batch, batch_tiles, batch_kept, found);
  verify(search, found);
}

template <TopkInput kInput>
using Input = std::integral_constant<TopkInput, kInput>;

}  // namespace

template <class K>
void launch_filter(const TopkLaunch& to, const TopkTable& table, const TopkSearch<K>* bound,
                   const TopkFound<K>& found) {
  using T = std::conditional_t<sizeof(K) == 8, double, float>;
  const auto start = [&](auto input) {
    constexpr TopkInput kInput = decltype(input)::value;
    const auto kernel = filter_kernel<kInput, K>;
    static_assert(sizeof(Batch<K>) + kRingBytes<kInput> <= 48 * 1024, "without opting in to more");
    const int64_t most =
        int64_t{to.multiprocessors} * resident_blocks(kernel, kTileThreads<T>, kRingBytes<kInput>);
    launch(kernel, std::min(table.tiles, most), kTileThreads<T>, kRingBytes<kInput>, to.stream,
           table, to.formula, bound, found);
  };
  if constexpr (sizeof(K) == 8) {
    start(Input<TopkInput::kDouble>{});
  } else if (to.input == TopkInput::kOne) {
    start(Input<TopkInput::kOne>{});
  } else if (to.input == TopkInput::kTwo) {
    start(Input<TopkInput::kTwo>{});
  } else {
    start(Input<TopkInput::kHash>{});
  }
}

#define PIECE_OPS_INSTANTIATE(K)                                                            \
  template void launch_filter<K>(const TopkLaunch&, const TopkTable&, const TopkSearch<K>*, \
                                 const TopkFound<K>&);
PIECE_OPS_INSTANTIATE(uint32_t)
PIECE_OPS_INSTANTIATE(uint64_t)
#undef PIECE_OPS_INSTANTIATE

}  // namespace piece_ops::cuda
