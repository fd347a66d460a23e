// select_topk_bound.cu - searches for the rank-th largest key of a sample, the kept, or all scores.
//
// What       A lower bound of the k-th largest score (guessed from a sample, or proven by the
//            digits of all scores or of the maxima), and the exact k-th largest of the kept.
// Algorithm  prepare: which tensor each tile belongs to, where its excluded entries begin (binary
//            searches, a thread a tile); the search's first rank.
//            sample: a thread a stratum; one element at a hashed place, so no stride that data
//            could share and the same sample every time. An excluded element counts as the lowest.
//            digit: a histogram of one digit of the keys that have the prefix found so far (filter
//            and histogram in one read), then one block picks the bin that holds the rank-th
//            largest. The host launches all digits at once; a search that is done lets them pass.
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

constexpr int kListThreads = 512;
constexpr int kHistogramThreads = 512;
constexpr int kPickThreads = 1024;
static_assert(kMaxBins == 4 * kPickThreads, "four bins a thread");
// Counts of one block before its 32-bit counters are merged; in tests few, so that it happens.
#if defined(PIECE_OPS_CUDA_EMULATION)
constexpr int64_t kMergeAfter = int64_t{1} << 14;
#else
constexpr int64_t kMergeAfter = int64_t{1} << 31;
#endif

template <class K>
__global__ void __launch_bounds__(256)
    prepare_kernel(TopkTable table, TopkSearch<K>* search, int64_t rank) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    // rank 0: there is nothing to search, the bound is the lowest key.
    *search = TopkSearch<K>{0, 0, rank == 0, rank, 0, 0};
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       tile < table.tiles; tile += stride) {
    const int64_t tensor =
        last_start(table.count, tile, [&](int64_t t) { return table.first_tile(t); });
    table.tile_tensors[tile] = static_cast<int32_t>(tensor);
    if (table.exclude_starts == nullptr) continue;
    const TopkRow& row = table.rows[tensor];
    const int64_t begin = table.tile_begin(tile, tensor);
    int64_t first = 0;
    int64_t last = row.exclude_n;
    while (first < last) {
      const int64_t middle = first + (last - first) / 2;
      if (row.exclude[middle] < begin) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    table.exclude_starts[tile] = first;
  }
}

template <TopkInput kInput, class K>
__global__ void __launch_bounds__(256)
    sample_kernel(TopkTable table, TopkFormula formula, TopkStrata strata, K* keys) {
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
  }
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

template <class K>
__global__ void __launch_bounds__(kListThreads)
    list_digit_kernel(const K* keys, const unsigned long long* count, int64_t limit, int bits,
                      const TopkSearch<K>* search, unsigned long long* histogram) {
  __shared__ uint32_t bins[kMaxBins];
  if (search->done) return;  // all threads alike: no barrier is missed
  const Digit<K> digit(*search, bits);
  int64_t n = limit;
  if (count != nullptr && *count < static_cast<unsigned long long>(limit)) {
    n = static_cast<int64_t>(*count);
  }
  clear_bins(bins, 1 << bits);
  __syncthreads();  // the bins are zero
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += stride) {
    const K key = keys[i];
    if (digit.has(key)) atomicAdd(bins + digit.bin(key), 1u);
  }
  __syncthreads();  // all counts are in
  merge_bins(bins, 1 << bits, histogram);
}

// A warp takes parts of tiles on its own; only the bins are shared.
template <TopkInput kInput, class K>
__global__ void __launch_bounds__(kHistogramThreads)
    score_digit_kernel(TopkTable table, TopkFormula formula, int bits, const TopkSearch<K>* search,
                       unsigned long long* histogram) {
  using T = ScoreOf<kInput>;
  constexpr int kWarps = kHistogramThreads / kWarp;
  static_assert(kWarps % kTileWarps<T> == 0, "all parts of a tile are counted by one block");
  __shared__ uint32_t bins[kMaxBins];
  if (search->done || table.is_broken()) return;  // all threads alike: no barrier is missed
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
      merge_bins(bins, 1 << bits, histogram);
      clear_bins(bins, 1 << bits);  // by the thread that merged them
      __syncthreads();              // the bins are zero
    }
  }
  __syncthreads();  // all counts are in
  merge_bins(bins, 1 << bits, histogram);
}

// One block: the bin in which the rank-th largest lies. Leaves the histogram zero.
template <class K>
__global__ void __launch_bounds__(kPickThreads)
    pick_kernel(TopkSearch<K>* search, int bits, int64_t enough, unsigned long long* histogram) {
  __shared__ unsigned long long warp_sums[kPickThreads / kWarp];
  if (search->done) return;  // all threads alike: no barrier is missed
  const TopkSearch<K> before = *search;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  // Thread t has four bins, counted from the top: t = 0 the largest.
  const int top = (1 << bits) - 1 - 4 * static_cast<int>(threadIdx.x);
  unsigned long long counts[4];
  unsigned long long own = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    counts[b] = top - b >= 0 ? histogram[top - b] : 0;
    if (top - b >= 0) histogram[top - b] = 0;
    own += counts[b];
  }
  unsigned long long upto = warp_scan(own, lane);
  if (lane == kWarp - 1) warp_sums[warp] = upto;
  __syncthreads();  // the warps' sums are there; and everybody has read *search
  for (int w = 0; w < warp; ++w) upto += warp_sums[w];
  unsigned long long above = upto - own;
  const unsigned long long rank = static_cast<unsigned long long>(before.rank);
  if (above >= rank || rank > upto) return;  // exactly one thread stays
  int b = 0;
  while (above + counts[b] < rank) above += counts[b++];
  TopkSearch<K> after = before;
  after.prefix = static_cast<K>(before.prefix << bits) | static_cast<K>(top - b);
  after.known = before.known + bits;
  after.rank = before.rank - static_cast<int64_t>(above);
  after.above = before.above + static_cast<int64_t>(above);
  after.inside = static_cast<int64_t>(counts[b]);
  after.done = after.known == static_cast<int>(sizeof(K)) * 8 || after.inside <= enough;
  *search = after;
}

int64_t blocks_for(int64_t work, int64_t per_block, int64_t most) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

template <class K>
void launch_prepare(const TopkLaunch& to, const TopkTable& table, TopkSearch<K>* search,
                    int64_t rank) {
  launch(prepare_kernel<K>, blocks_for(table.tiles, 256, int64_t{to.multiprocessors} * 8), 256, 0,
         to.stream, table, search, rank);
}

template <class K>
void launch_sample(const TopkLaunch& to, const TopkTable& table, TopkStrata strata, K* keys) {
  const int64_t grid = blocks_for(strata.count, 256, int64_t{to.multiprocessors} * 8);
  if constexpr (sizeof(K) == 8) {
    launch(sample_kernel<TopkInput::kDouble, K>, grid, 256, 0, to.stream, table, to.formula, strata,
           keys);
  } else {
    const auto kernel = to.input == TopkInput::kOne   ? sample_kernel<TopkInput::kOne, K>
                        : to.input == TopkInput::kTwo ? sample_kernel<TopkInput::kTwo, K>
                                                      : sample_kernel<TopkInput::kHash, K>;
    launch(kernel, grid, 256, 0, to.stream, table, to.formula, strata, keys);
  }
}

template <class K>
void launch_search_list(const TopkLaunch& to, const K* keys, const unsigned long long* count,
                        int64_t limit, TopkSearch<K>* search, unsigned long long* histogram) {
  const int64_t grid = blocks_for(limit, kListThreads * 4, int64_t{to.multiprocessors} * 2);
  for (int digit = 0; digit < digit_count(sizeof(K)); ++digit) {
    const int bits = digit_bits(sizeof(K), digit);
    launch(list_digit_kernel<K>, grid, kListThreads, 0, to.stream, keys, count, limit, bits, search,
           histogram);
    launch(pick_kernel<K>, 1, kPickThreads, 0, to.stream, search, bits, 0, histogram);
  }
}

template <class K>
void launch_search_scores(const TopkLaunch& to, const TopkTable& table, TopkSearch<K>* search,
                          unsigned long long* histogram, int64_t enough) {
  using T = std::conditional_t<sizeof(K) == 8, double, float>;
  const int64_t grid = blocks_for(table.tiles * kTileWarps<T>, kHistogramThreads / kWarp,
                                  int64_t{to.multiprocessors} * 2);
  for (int digit = 0; digit < digit_count(sizeof(K)); ++digit) {
    const int bits = digit_bits(sizeof(K), digit);
    if constexpr (sizeof(K) == 8) {
      launch(score_digit_kernel<TopkInput::kDouble, K>, grid, kHistogramThreads, 0, to.stream,
             table, to.formula, bits, search, histogram);
    } else {
      const auto kernel = to.input == TopkInput::kOne   ? score_digit_kernel<TopkInput::kOne, K>
                          : to.input == TopkInput::kTwo ? score_digit_kernel<TopkInput::kTwo, K>
                                                        : score_digit_kernel<TopkInput::kHash, K>;
      launch(kernel, grid, kHistogramThreads, 0, to.stream, table, to.formula, bits, search,
             histogram);
    }
    launch(pick_kernel<K>, 1, kPickThreads, 0, to.stream, search, bits, enough, histogram);
  }
}

#define PIECE_OPS_INSTANTIATE(K)                                                                 \
  template void launch_prepare<K>(const TopkLaunch&, const TopkTable&, TopkSearch<K>*, int64_t); \
  template void launch_sample<K>(const TopkLaunch&, const TopkTable&, TopkStrata, K*);           \
  template void launch_search_list<K>(const TopkLaunch&, const K*, const unsigned long long*,    \
                                      int64_t, TopkSearch<K>*, unsigned long long*);             \
  template void launch_search_scores<K>(const TopkLaunch&, const TopkTable&, TopkSearch<K>*,     \
                                        unsigned long long*, int64_t);
PIECE_OPS_INSTANTIATE(uint32_t)
PIECE_OPS_INSTANTIATE(uint64_t)
#undef PIECE_OPS_INSTANTIATE

}  // namespace piece_ops::cuda
