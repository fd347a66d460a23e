// select_topk_bound.cu - searches for the rank-th largest key of a sample, the kept, or all scores.
//
// What       A lower bound of the k-th largest score (guessed from a sample, or proven by the
//            digits of all scores or of the maxima), and the exact k-th largest of the kept.
// Algorithm  prepare: the state's zeros; which tensor each tile belongs to, where its excluded
//            entries begin (binary searches, a thread a tile); the search's first rank.
//            sample: a thread a stratum; one element at a hashed place, so no stride that data
//            could share and the same sample every time. An excluded element counts as the lowest.
//            Its first digit is counted on the way.
//            digit: a histogram of one digit of the keys that have the prefix found so far (filter
//            and histogram in one read), then the last block picks the bin that holds the rank-th
//            largest. The host launches all digits at once; a search that is done lets them pass.
//            (The first digit cannot go into prepare: its blocks may not rely on each other's zeros.)
//            Histograms live in shared memory, 32-bit counters for each block, merged (bins that
//            are not zero) into 64-bit ones; a block merges before 2^31 of its own counts.
// Traffic    sample 32 bytes a stratum (a sector): 0.2 % of float32. A digit over all scores: one
//            read of them; over a list: 4 (8) bytes an entry, from L2. Merge: at most 8 bytes a bin
//            a block. Bound: HBM for scores, launch latency (some 5 us a digit) for lists. H200 at
//            4.3 TB/s, float32: a digit of 1e9 scores 0.93 ms, of 8e9 7.5 ms; the sample and its
//            search together about 0.02 ms for both.
// Scratch    8 * 4096 bytes of histogram; the sample: 4 (8) bytes for each of at most 2^20 strata
//            (the second: 2^22).
// Determinism  integer counts only: sums do not depend on their order.
// Limits     float32 keys take 3 digits (12, 10, 10 bits), float64 keys 6 (12, 12, 4 of 10).
// Source     digits: Alabi et al., JEA 17, 2012; filter and histogram in one read: AIR top-k,
//            SC'23.
#include "select_topk_load.h"

namespace piece_ops::cuda {

namespace {

constexpr int kDigitThreads = 512;
constexpr int kRun = kMaxBins / kDigitThreads;  // bins of a thread, when one is picked
constexpr int kInFlight = 4;                    // keys of a list that a thread has on their way
// Counts of one block before its 32-bit counters are merged; in tests few, so that it happens.
#if defined(PIECE_OPS_CUDA_EMULATION)
constexpr int64_t kMergeAfter = int64_t{1} << 14;
#else
constexpr int64_t kMergeAfter = int64_t{1} << 31;
#endif

// Which tensor each tile of a table belongs to, where its excluded entries begin; a thread a tile.
PIECE_OPS_DEVICE void fill_tiles(const TopkTable& table, int64_t first, int64_t stride) {
  for (int64_t tile = first; tile < table.tiles; tile += stride) {
    const int64_t tensor =
        last_start(table.count, tile, [&](int64_t t) { return table.first_tile(t); });
    table.tile_tensors[tile] = static_cast<int32_t>(tensor);
    if (table.exclude_starts == nullptr) continue;
    const TopkRow& row = table.rows[tensor];
    const int64_t begin = table.tile_begin(tile, tensor);
    int64_t low = 0;
    int64_t high = row.exclude_n;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (row.exclude[middle] < begin) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    table.exclude_starts[tile] = low;
  }
}

// What is set here is used by later launches only: no block may rely on another one's zeros.
template <class K>
__global__ void __launch_bounds__(256)
    prepare_kernel(TopkTable table, TopkTable maxima, TopkFound<K> found, TopkSearch<K>* bound,
                   int64_t rank) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  TopkState& state = *found.state;
  if (first == 0) {
    state.kept = 0;
    state.ties = 0;
    state.first_nan = 0;
    state.quota = 0;
    state.ticket = 0;
    // The filter says otherwise, unless it must not run.
    state.status = table.is_broken() ? TopkReport::kBroken : TopkReport::kMissed;
    *found.threshold = TopkSearch<K>{0, 0, 1, 0, 0, 0};
    // rank 0: there is nothing to search, the bound is the lowest key.
    *bound = TopkSearch<K>{0, 0, rank == 0, rank, 0, 0};
  }
  for (int64_t b = first; b < kMaxBins; b += stride) state.histogram[b] = 0;
  if (found.nans != nullptr) {
    for (int64_t t = first; t < table.count; t += stride) found.nans[t] = 0;
  }
  fill_tiles(table, first, stride);
  fill_tiles(maxima, first, stride);
}

// ---- one digit ----------------------------------------------------------------------------------

// Which digit, and of which keys.
template <class K>
struct Digit {
  K prefix;
  int known;
  int shift;
  K mask;

  PIECE_OPS_DEVICE Digit(const TopkSearch<K>& search, int bits)
      : prefix(search.prefix),
        known(search.known),
        shift(static_cast<int>(sizeof(K)) * 8 - search.known - bits),
        mask((K{1} << bits) - 1) {}
  PIECE_OPS_DEVICE bool has(K key) const {
    return known == 0 || key >> (static_cast<int>(sizeof(K)) * 8 - known) == prefix;
  }
  PIECE_OPS_DEVICE int bin(K key) const { return static_cast<int>((key >> shift) & mask); }
};

PIECE_OPS_DEVICE void clear_bins(uint32_t* bins, int count) {
  for (int b = threadIdx.x; b < count; b += blockDim.x) bins[b] = 0;
}
PIECE_OPS_DEVICE void merge_bins(const uint32_t* bins, int count, unsigned long long* histogram) {
  for (int b = threadIdx.x; b < count; b += blockDim.x) {
    if (bins[b]) atomicAdd(histogram + b, static_cast<unsigned long long>(bins[b]));
  }
}

// The bin in which the rank-th largest lies; all threads of the last block. Leaves the histogram zero.
template <class K>
PIECE_OPS_DEVICE void pick(int bits, int64_t enough, TopkSearch<K>* search, TopkState* state) {
  __shared__ unsigned long long warp_sums[kDigitThreads / kWarp];
  const unsigned long long rank = static_cast<unsigned long long>(search->rank);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  // Bins are counted from the top: thread 0 has the largest ones. Read twice rather than kept: the
  // kernels that end here have no registers to spare.
  const int top = (1 << bits) - 1 - kRun * static_cast<int>(threadIdx.x);
  const int bottom = top - kRun < -1 ? -1 : top - kRun;
  unsigned long long own = 0;
#pragma unroll 4
  for (int b = top; b > bottom; --b) own += state->histogram[b];
  unsigned long long upto = warp_scan(own, lane);
  if (lane == kWarp - 1) warp_sums[warp] = upto;
  __syncthreads();  // the warps' sums are there; and everybody has read the rank
  for (int w = 0; w < warp; ++w) upto += warp_sums[w];
  unsigned long long above = upto - own;
  if (above < rank && rank <= upto) {  // exactly one thread
    int b = top;
    unsigned long long inside = state->histogram[b];
    while (above + inside < rank) {
      above += inside;
      inside = state->histogram[--b];
    }
    search->prefix = static_cast<K>(search->prefix << bits) | static_cast<K>(b);
    search->known += bits;
    search->rank -= static_cast<int64_t>(above);
    search->above += static_cast<int64_t>(above);
    search->inside = static_cast<int64_t>(inside);
    search->done = search->known == static_cast<int>(sizeof(K)) * 8 ||
                   inside <= static_cast<unsigned long long>(enough);
  }
  for (int b = top; b > bottom; --b) state->histogram[b] = 0;
}

// The end of a kernel that has counted a digit in its blocks' bins: all threads of all blocks. Every
// block read *search when it began, so the last one may write it.
template <class K>
PIECE_OPS_DEVICE void end_digit(const uint32_t* bins, int bits, int64_t enough,
                                TopkSearch<K>* search, TopkState* state) {
  __syncthreads();  // all counts are in
  merge_bins(bins, 1 << bits, state->histogram);
  if (is_last_block(&state->ticket)) pick(bits, enough, search, state);
}

// Draws the sample, with its first digit. A thread a stratum.
template <TopkInput kInput, class K>
__global__ void __launch_bounds__(kDigitThreads)
    sample_kernel(TopkTable table, TopkFormula formula, TopkStrata strata, int bits, K* keys,
                  TopkSearch<K>* search, TopkState* state) {
  __shared__ uint32_t bins[kMaxBins];
  const Digit<K> digit(*search, bits);
  clear_bins(bins, 1 << bits);
  __syncthreads();  // the bins are zero
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; s < strata.count;
       s += stride) {
    uint64_t h = (static_cast<uint64_t>(s) * 0x9e3779b97f4a7c15ull) ^ strata.salt;
    h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull;
    const int64_t begin = s * strata.length;
    const int64_t left = table.n - begin;
    const uint64_t own = static_cast<uint64_t>(left < strata.length ? left : strata.length);
    const int64_t position = begin + static_cast<int64_t>(((h >> 32) * own) >> 32);
    // The last tensor that starts at or before the position holds it: an empty one that starts
    // there comes before.
    const TopkRow& row = table.rows[last_start(
        table.count, position, [&](int64_t tensor) { return table.rows[tensor].start; })];
    const int64_t i = position - row.start;
    K key = to_key(score_at<kInput>(row, formula, i));
    if (row.exclude_n && is_listed(row.exclude, 0, row.exclude_n, i)) key = 0;
    keys[s] = key;
    atomicAdd(bins + digit.bin(key), 1u);
  }
  end_digit(bins, bits, 0, search, state);
}

template <class K>
__global__ void __launch_bounds__(kDigitThreads)
    list_digit_kernel(const K* keys, const unsigned long long* count, int64_t limit, int bits,
                      TopkSearch<K>* search, TopkState* state) {
  __shared__ uint32_t bins[kMaxBins];
  if (search->done) return;  // all threads of all blocks alike: no ticket is drawn
  const Digit<K> digit(*search, bits);
  int64_t n = limit;
  if (count != nullptr && *count < static_cast<unsigned long long>(limit)) {
    n = static_cast<int64_t>(*count);
  }
  clear_bins(bins, 1 << bits);
  __syncthreads();  // the bins are zero
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += kInFlight * stride) {
    K own[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) own[u] = i + u * stride < n ? keys[i + u * stride] : K{0};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (i + u * stride < n && digit.has(own[u])) atomicAdd(bins + digit.bin(own[u]), 1u);
    }
  }
  end_digit(bins, bits, 0, search, state);
}

// A warp takes parts of tiles on its own; only the bins are shared. float64 spills (sm_120) where two
// blocks must fit; one has 64 KiB on their way, and the bus needs 35. 0: as the compiler likes.
template <TopkInput kInput, class K>
__global__ void __launch_bounds__(kDigitThreads, kInput == TopkInput::kDouble ? 1 : 0)
    score_digit_kernel(TopkTable table, TopkFormula formula, int bits, int64_t enough,
                       TopkSearch<K>* search, TopkState* state) {
  using T = ScoreOf<kInput>;
  constexpr int kWarps = kDigitThreads / kWarp;
  static_assert(kWarps % kTileWarps<T> == 0, "all parts of a tile are counted by one block");
  __shared__ uint32_t bins[kMaxBins];
  if (search->done || table.is_broken()) return;  // all threads of all blocks alike
  const Digit<K> digit(*search, bits);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t parts = table.tiles * kTileWarps<T>;
  clear_bins(bins, 1 << bits);
  __syncthreads();  // the bins are zero
  int64_t counted = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps; first < parts;
       first += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t part = first + warp;
    if (part < parts) {
      const int64_t tile = part / kTileWarps<T>;
      const int64_t tensor = table.tile_tensors[tile];
      const TopkRow& row = table.rows[tensor];
      const int64_t begin = table.tile_begin(tile, tensor) + part % kTileWarps<T> * kPartSlots<T>;
      with_width<kInput>(row, [&](auto width) {
        T x[kPerLane<T>];
        const uint32_t valid =
            load_part<kInput, decltype(width)::value>(row, formula, begin, lane, x);
#pragma unroll
        for (int j = 0; j < kPerLane<T>; ++j) {
          const K key = to_key(x[j]);
          if ((valid >> j & 1u) && digit.has(key)) atomicAdd(bins + digit.bin(key), 1u);
        }
      });
      if (part % kTileWarps<T> ==
          0) {  // of the whole tile, whose other parts this block counts too
        const Excluded excluded = excluded_of(table, row, tile, tensor);
        for (int64_t e = excluded.begin + lane; e < excluded.end; e += kWarp) {
          const K key = to_key(score_at<kInput>(row, formula, excluded.list[e]));
          // Modulo 2^32: a counter may be below zero in between, not at the merge.
          if (digit.has(key)) atomicAdd(bins + digit.bin(key), ~0u);
        }
      }
    }
    counted += kWarps * kPartSlots<T>;
    if (counted >= kMergeAfter) {
      counted = 0;
      __syncthreads();  // all counts of this round are in
      merge_bins(bins, 1 << bits, state->histogram);
      clear_bins(bins, 1 << bits);  // by the thread that merged them
      __syncthreads();              // the bins are zero
    }
  }
  end_digit(bins, bits, enough, search, state);
}

int64_t blocks_for(int64_t work, int64_t per_block, int64_t most) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

template <class K>
void launch_prepare(const TopkLaunch& to, const TopkTable& table, const TopkTable& maxima,
                    const TopkFound<K>& found, TopkSearch<K>* bound, int64_t rank) {
  launch(prepare_kernel<K>, blocks_for(table.tiles, 256, int64_t{to.multiprocessors} * 8), 256, 0,
         to.stream, table, maxima, found, bound, rank);
}

template <class K>
void launch_search_list(const TopkLaunch& to, const K* keys, const unsigned long long* count,
                        int64_t limit, int first_digit, TopkSearch<K>* search, TopkState* state) {
  const int64_t grid =
      blocks_for(limit, kDigitThreads * kInFlight, int64_t{to.multiprocessors} * 2);
  for (int digit = first_digit; digit < digit_count(sizeof(K)); ++digit) {
    launch(list_digit_kernel<K>, grid, kDigitThreads, 0, to.stream, keys, count, limit,
           digit_bits(sizeof(K), digit), search, state);
  }
}

template <class K>
void launch_search_sample(const TopkLaunch& to, const TopkTable& table, TopkStrata strata, K* keys,
                          TopkSearch<K>* search, TopkState* state) {
  const int64_t grid = blocks_for(strata.count, kDigitThreads, int64_t{to.multiprocessors} * 4);
  const auto start = [&](auto kernel) {
    launch(kernel, grid, kDigitThreads, 0, to.stream, table, to.formula, strata,
           digit_bits(sizeof(K), 0), keys, search, state);
  };
  if constexpr (sizeof(K) == 8) {
    start(sample_kernel<TopkInput::kDouble, K>);
  } else {
    start(to.input == TopkInput::kOne   ? sample_kernel<TopkInput::kOne, K>
          : to.input == TopkInput::kTwo ? sample_kernel<TopkInput::kTwo, K>
                                        : sample_kernel<TopkInput::kHash, K>);
  }
  launch_search_list<K>(to, keys, nullptr, strata.count, 1, search, state);
}

template <class K>
void launch_search_scores(const TopkLaunch& to, const TopkTable& table, TopkSearch<K>* search,
                          TopkState* state, int64_t enough) {
  using T = std::conditional_t<sizeof(K) == 8, double, float>;
  const int64_t grid = blocks_for(table.tiles * kTileWarps<T>, kDigitThreads / kWarp,
                                  int64_t{to.multiprocessors} * 2);
  const auto start = [&](auto kernel) {
    for (int digit = 0; digit < digit_count(sizeof(K)); ++digit) {
      launch(kernel, grid, kDigitThreads, 0, to.stream, table, to.formula,
             digit_bits(sizeof(K), digit), enough, search, state);
    }
  };
  if constexpr (sizeof(K) == 8) {
    start(score_digit_kernel<TopkInput::kDouble, K>);
  } else {
    start(to.input == TopkInput::kOne   ? score_digit_kernel<TopkInput::kOne, K>
          : to.input == TopkInput::kTwo ? score_digit_kernel<TopkInput::kTwo, K>
                                        : score_digit_kernel<TopkInput::kHash, K>);
  }
}

#define PIECE_OPS_INSTANTIATE(K)                                                              \
  template void launch_prepare<K>(const TopkLaunch&, const TopkTable&, const TopkTable&,      \
                                  const TopkFound<K>&, TopkSearch<K>*, int64_t);              \
  template void launch_search_sample<K>(const TopkLaunch&, const TopkTable&, TopkStrata, K*,  \
                                        TopkSearch<K>*, TopkState*);                          \
  template void launch_search_list<K>(const TopkLaunch&, const K*, const unsigned long long*, \
                                      int64_t, int, TopkSearch<K>*, TopkState*);              \
  template void launch_search_scores<K>(const TopkLaunch&, const TopkTable&, TopkSearch<K>*,  \
                                        TopkState*, int64_t);
PIECE_OPS_INSTANTIATE(uint32_t)
PIECE_OPS_INSTANTIATE(uint64_t)
#undef PIECE_OPS_INSTANTIATE

}  // namespace piece_ops::cuda
