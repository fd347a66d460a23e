// select_topk_small.cu - a selection of its own for each of many small tensors, in one launch.
//
// What       For every tensor with k >= 0 in its row: its k largest, counts, and a report of its
//            own.
// Algorithm  A block takes a tensor:
//            1. digits: a shared histogram of one digit of the keys with the prefix found so far;
//               each thread scans a run of bins, the one that holds the k-th largest sets the
//               prefix. float32 3 digits, float64 6. The first one counts NaN as well.
//            2. positions: 256 elements at a time, in order; ballots and a scan of the warps'
//               counts give each chosen one its place; ties are chosen while the quota lasts.
// Traffic    the tensor digits + 1 times, all but the first from L2 (L1); 8 bytes a selected
//            element. Bound: latency, some 20 us for 65,536 elements; 10,000 tensors of 1000: 0.1
//            ms.
// Scratch    none.
// Determinism  integer counts; positions in order.
// Limits     any size is right; past some 65,536 elements one block is slow, and select_topk.cu is
//            used.
#include "select_topk_load.h"

namespace piece_ops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRun = kMaxBins / kThreads;  // bins a thread scans

// Sum over the threads before this one, and (in *all) over the block. Everybody calls it.
PIECE_OPS_DEVICE uint32_t block_scan(uint32_t own, uint32_t (&warp_sums)[kWarps], uint32_t* all) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const uint32_t upto = warp_scan(own, lane);
  if (lane == kWarp - 1) warp_sums[warp] = upto;
  __syncthreads();  // the warps' sums are there
  uint32_t before = upto - own;
  *all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    *all += warp_sums[w];
  }
  return before;
}

template <TopkInput kInput, class K>
__global__ void __launch_bounds__(kThreads, 6)
    small_kernel(const TopkRow* rows, TopkFormula formula, const int64_t* check, bool nan_is_lowest,
                 int64_t* indices, int64_t* counts, TopkReport* reports) {
  using T = ScoreOf<kInput>;
  constexpr int kWidth = static_cast<int>(sizeof(K)) * 8;
  __shared__ uint32_t bins[kMaxBins];
  __shared__ uint32_t warp_sums[2][kWarps];
  __shared__ uint32_t nans;
  __shared__ K found_prefix;
  __shared__ uint32_t found_rank;
  const TopkRow& row = rows[blockIdx.x];
  TopkReport* const report = reports + blockIdx.x;
  if (row.k < 0) return;  // all threads alike
  if (check != nullptr && *check != kNothingWrong) {
    if (threadIdx.x == 0) {
      *report = TopkReport{};
      report->status = TopkReport::kBroken;
      report->check = *check;
    }
    return;  // all threads alike
  }
  if (row.k == 0) {
    if (threadIdx.x == 0) {
      counts[blockIdx.x] = 0;
      *report = TopkReport{};
      report->threshold = static_cast<double>(bit_cast<T>(Key<T>{KeyType<T>::kInfinity}));
      report->nan_tensor = -1;
    }
    return;
  }
  const auto is_excluded = [&](int64_t i) {
    return row.exclude_n != 0 && is_listed(row.exclude, 0, row.exclude_n, i);
  };

  // 1. digits
  if (threadIdx.x == 0) nans = 0;
  K prefix = 0;
  int known = 0;
  uint32_t rank = static_cast<uint32_t>(row.k);
  for (int d = 0; d < digit_count(sizeof(K)); ++d) {
    const int bits = digit_bits(sizeof(K), d);
    const int shift = kWidth - known - bits;
    for (int b = threadIdx.x; b < kMaxBins; b += kThreads) bins[b] = 0;
    __syncthreads();  // the bins are zero
    for (int64_t i = threadIdx.x; i < row.n; i += kThreads) {
      const K key = to_key(score_at<kInput>(row, formula, i));
      if (d == 0 && key == 0) atomicAdd(&nans, 1u);
      if (known != 0 && key >> (kWidth - known) != prefix) continue;
      if (is_excluded(i)) continue;
      atomicAdd(bins + static_cast<int>((key >> shift) & ((K{1} << bits) - 1)), 1u);
    }
    __syncthreads();                         // all counts are in
    if (nans != 0 && !nan_is_lowest) break;  // all threads alike
    // Bins from the top: thread 0 has the largest ones.
    const int top = kMaxBins - 1 - kRun * static_cast<int>(threadIdx.x);
    uint32_t own = 0;
    for (int b = 0; b < kRun; ++b) own += bins[top - b];
    uint32_t all;
    uint32_t above = block_scan(own, warp_sums[0], &all);
    if (above < rank && rank <= above + own) {  // one thread
      int b = top;
      while (above + bins[b] < rank) above += bins[b--];
      found_prefix = static_cast<K>(prefix << bits) | static_cast<K>(b);
      found_rank = rank - above;
    }
    __syncthreads();  // prefix and rank are there; all bins and sums have been read
    prefix = found_prefix;
    rank = found_rank;
    known += bits;
  }
  if (nans != 0 && !nan_is_lowest) {
    if (threadIdx.x == 0) {
      *report = TopkReport{};
      report->status = TopkReport::kNan;
      report->nan_tensor = blockIdx.x;
      report->nan_count = nans;
    }
    return;  // all threads alike
  }

  // 2. positions; rank is now how many ties are chosen
  uint32_t ties_before = 0;
  int64_t out = row.out;
  for (int64_t first = 0; first < row.n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    K key = 0;
    bool exists = i < row.n;
    if (exists) {
      key = to_key(score_at<kInput>(row, formula, i));
      exists = key >= prefix && !is_excluded(i);
    }
    const bool is_above = exists && key > prefix;
    const bool is_tie = exists && key == prefix;
    uint32_t all;
    // above << 16 | ties; two arrays in turn, so that one barrier a step is enough.
    const uint32_t before =
        block_scan(static_cast<uint32_t>(is_above) << 16 | static_cast<uint32_t>(is_tie),
                   warp_sums[first / kThreads % 2], &all);
    const uint32_t ties_here = ties_before + (before & 0xffffu);
    if (is_above || (is_tie && ties_here < rank)) {
      indices[out + (before >> 16) + (ties_here < rank ? ties_here : rank)] = i;
    }
    out += all >> 16;
    ties_before += all & 0xffffu;
  }
  if (threadIdx.x == 0) {
    counts[blockIdx.x] = row.k;
    *report = TopkReport{};
    report->threshold = static_cast<double>(from_key<T>(prefix));
    report->ties_kept = rank;
    report->nan_tensor = -1;
  }
}

}  // namespace

void launch_small(const TopkLaunch& to, const TopkRow* rows, int64_t count, const int64_t* check,
                  bool nan_is_lowest, int64_t* indices, int64_t* counts, TopkReport* reports) {
  const auto kernel = to.input == TopkInput::kOne    ? small_kernel<TopkInput::kOne, uint32_t>
                      : to.input == TopkInput::kTwo  ? small_kernel<TopkInput::kTwo, uint32_t>
                      : to.input == TopkInput::kHash ? small_kernel<TopkInput::kHash, uint32_t>
                                                     : small_kernel<TopkInput::kDouble, uint64_t>;
  launch(kernel, count, kThreads, 0, to.stream, rows, to.formula, check, nan_is_lowest, indices,
         counts, reports);
}

}  // namespace piece_ops::cuda
