// select_topk.cu - the k largest of all scores in a list of tensors, exactly: the launches in turn.
//
// What       larger score first, equal scores by smaller position in the caller's order; NaN is
//            reported, or ranks below -inf; -0 equals +0 (docs/contracts.md#select_topk). The same
//            bits as csrc/cpu/select_topk.cpp.
// Algorithm  1. bound (select_topk_bound.cu): a lower bound of the k-th largest,
//               kSample    guessed from a sample of one score in 4096: about 1.2 k exceed it;
//               kMaxima    proven by the digits of the maxima of every 32 scores;
//               kResample  guessed again, from four times as many scores elsewhere, with twice the
//                          margin: what misled the first sample does not mislead this one;
//               kDigits    proven by the digits of all scores (radix select), 12 bits, then 10 and
//                          10, until few enough share the prefix or the key is complete.
//            2. filter (select_topk_filter.cu): one read; keeps (key, slot) above the bound, counts
//               what equals it, so data with few distinct values costs no more than any other.
//               Where maxima are known (select_topk_sparse.cu) only the chunks that reach the bound
//               are read.
//            3. verify (select_topk_verify.h): kept + ties >= k, and kept within its room; else the
//               report says "missed" and the caller tries the next way. kDigits cannot miss.
//            4. finish: the exact k-th largest of the kept, by digits, in L2; then positions, tile
//               by tile, in order (select_topk_emit.cu).
//            A dense selection (k > n / 4) keeps nothing: all digits, one read that counts, one
//            that writes. Everything is launched at once; a step that is not needed returns at
//            once. The host synchronises when it reads the report, once for each way tried.
// Launches   11 launches (float64: 17; dense: 8), whatever the data, counted on the emulation: prepare;
//            sample with its first digit, 2 digits; filter and verify; 3 digits; share and scan,
//            emit, reread and report. What needs the results of all blocks of a kernel is done by its
//            last block to end (is_last_block of gpu.h). Compiled and emulated, not run on a GPU.
//            With 22 launches, 1e9 scores took an H200 1.11 ms in the filter (3.6 TB/s; before its
//            ring, select_topk_ring.h), 0.09 before it and 0.08 after it (2026-11-28). A launch costs
//            3 to 5 us where it waits for the one before; 11 fewer at 4 us are 0.044 ms: 0.13 instead
//            of 0.17 ms beside the filter, and of whole calls, with the host of then, 1e9 1.58 -> 1.54
//            ms, 8e9 9.40 -> 9.36 (if the ring's filter takes the 0.94 and 7.5 ms predicted, 1.37 and
//            8.0), by the maxima 0.61 -> 0.57, fused with the accumulation 0.45 -> 0.41 (0.38 of a
//            read). Programmatic dependent launch would let a kernel start while the last one drains,
//            1 to 2 us each, but every kernel begins with what the one before wrote: not used.
// Traffic    bytes a score, float32, k = 0.1 %; predicted for an H200 at 4.3 TB/s read and 0.13 ms of
//            small kernels, and in brackets whole calls measured on one (2026-11-28, 22 launches),
//            0.3 ms of host time in each:
//               kSample           4.10   reads 1.02     1e9 1.08 ms [1.58]   8e9 7.8 ms [9.4]
//               kSample, maxima   0.29   reads 0.07     1e9 0.20 ms [0.61]   8e9 0.8 ms   (3e7: 0.44)
//               kMaxima           0.65   reads 0.16     1e9 0.33 ms    8e9 1.6 ms
//               kResample         4.15   reads 1.04     1e9 1.10 ms    8e9 8.0 ms
//               kDigits           8.1    reads 2 to 4   1e9 2.1 ms [2.5]     8e9 15.6 ms [18.2]
//               dense             20     reads 5        1e9 4.8 ms     8e9 38 ms
//            Bound: HBM; below 1e8 scores the launches.
//            Few distinct values: one read, and again those tiles whose ties are selected. Counted
//            on the emulation (pages each launch touches; 1e6 scores, k = 0.1 %): all equal 1.00,
//            99 % zeros 1.00, 5 values 1.01, 256 values 1.25, and the sample.
//            A missed sample (one selection in a thousand, or scores arranged against it) costs its
//            read and kResample: 2 reads and both samples (counted). Only scores arranged against
//            both come to kDigits.
// Scratch    6 (float64: 10) bytes for each of room = min(n, 2 k + n / 128 + 4096) kept scores, 32
//            to 40 a tile of 4096 (maxima: 32768), 4 (8) a sampled score, 33 KB: 0.07 bytes a score
//            at k = 0.1 %. Caller-owned.
// Determinism  integer counts; order by tiles. Blocks never wait for one another: one that draws the
//            last ticket does what is left.
// Limits     2^63 - 1 elements; 2^31 - 1 tensors; tensors in any alignment; sm_80 and later.
// Source     bound and verify: Floyd & Rivest, CACM 18(3), 1975; digits: Alabi et al., JEA 17, 2012;
//            maxima: Dr. Top-k, SC'21.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "select_topk_types.h"
#include "slots.h"

namespace piece_ops::cuda {

namespace {

static_assert(sizeof(TopkRow) % sizeof(int64_t) == 0, "rows are whole words");
constexpr int64_t kRowWords = sizeof(TopkRow) / sizeof(int64_t);

// ---- the table ----------------------------------------------------------------------------------

int64_t pad_of(const void* data, DType dtype) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16) / size_of(dtype);
}

int64_t tiles_of(int64_t n, int64_t pad, int64_t slots) {
  return n == 0 ? 0 : (n + pad + slots - 1) / slots;
}

TopkRow make_row(const SelectTopkArgs& args, const float* const* maxima, int64_t t) {
  TopkRow row{};
  const ConstView& first = args.first[t];
  row.first = first.data;
  row.n = first.n;
  row.first_dtype = static_cast<int32_t>(first.dtype);
  row.pad =
      args.score == Score::kRandom ? 0 : static_cast<int32_t>(pad_of(first.data, first.dtype));
  if (args.second != nullptr) {
    row.second = args.second[t].data;
    row.second_dtype = static_cast<int32_t>(args.second[t].dtype);
  }
  if (args.exclude != nullptr) {
    row.exclude = args.exclude[t].data;
    row.exclude_n = args.exclude[t].n;
  }
  if (maxima != nullptr) row.maxima = maxima[t];
  row.k = -1;
  return row;
}

// A row that has the maxima of another one as its scores.
TopkRow maxima_row(const TopkRow& of) {
  TopkRow row{};
  row.first = of.maxima;
  row.n = (of.n + kChunk - 1) / kChunk;
  row.first_dtype = static_cast<int32_t>(DType::kFloat32);
  row.pad = static_cast<int32_t>(pad_of(of.maxima, DType::kFloat32));
  row.k = -1;
  return row;
}

void append(const TopkRow& row, Table* table) {
  int64_t words[kRowWords];
  std::memcpy(words, &row, sizeof row);
  table->words.insert(table->words.end(), words, words + kRowWords);
}

// ---- sizes --------------------------------------------------------------------------------------

struct Sizes {
  int64_t n = 0;
  int64_t excluded = 0;
  int64_t dense_tiles = 0;
  int64_t sparse_tiles = 0;
  int64_t maxima = 0;
  int64_t maxima_tiles = 0;
};

Sizes measure(const SelectTopkArgs& args, const float* const* maxima) {
  Sizes sizes;
  for (int64_t t = 0; t < args.count; ++t) {
    const TopkRow row = make_row(args, maxima, t);
    sizes.n += row.n;
    sizes.excluded += row.exclude_n;
    sizes.dense_tiles += tiles_of(row.n, row.pad, kTileSlots);
    sizes.sparse_tiles += tiles_of(row.n, 0, kSparseSlots);
    if (maxima == nullptr) continue;
    const TopkRow of_maxima = maxima_row(row);
    sizes.maxima += of_maxima.n;
    sizes.maxima_tiles += tiles_of(of_maxima.n, of_maxima.pad, kTileSlots);
  }
  return sizes;
}

// One sampled score in 4096; more of a smaller array (8192 in all), more rarely past 2^31. The
// second sample has four times as many, elsewhere.
TopkStrata make_strata(int64_t n, TopkWay way) {
  TopkStrata strata{};
  strata.length = std::max(std::min<int64_t>(std::max<int64_t>(n / 8192, 16), 4096), n >> 19);
  if (way == TopkWay::kResample) {
    strata.length /= 4;
    strata.salt = 0xd1b54a32d192ed03ull;
  }
  strata.count = (n + strata.length - 1) / strata.length;
  return strata;
}

// The rank in the sample that about k scores and a margin reach: three standard deviations of the
// count and 4, so that fewer than one selection in 1000 misses; of the second sample twice and four
// times that. 0: the whole sample is not enough.
int64_t sample_rank(int64_t k, int64_t n, TopkWay way) {
  const int64_t sampled = make_strata(n, way).count;
  const double expected =
      static_cast<double>(k) * static_cast<double>(sampled) / static_cast<double>(n);
  const double wider = way == TopkWay::kResample ? 2.0 : 1.0;
  const double rank = std::ceil(expected + wider * (3.0 * std::sqrt(expected) + wider * 4.0));
  return rank >= static_cast<double>(sampled) ? 0 : static_cast<int64_t>(rank);
}

bool is_sampled(TopkWay way) { return way == TopkWay::kSample || way == TopkWay::kResample; }

int64_t spare_of(int64_t n) { return n / 128 + 4096; }

bool is_dense(const SelectTopkArgs& args, int64_t n) { return args.k > n / 4 && n > kSmallTopk; }

// The maxima help float32 arithmetic on stored statistics only, and a bound above something.
bool uses_maxima(const SelectTopkArgs& args, const float* const* maxima, const Sizes& sizes,
                 TopkWay way) {
  if (maxima == nullptr || args.score == Score::kRandom || args.first[0].dtype == DType::kFloat64) {
    return false;
  }
  switch (way) {
    case TopkWay::kSample:
    case TopkWay::kResample:
      return sample_rank(args.k, sizes.n, way) > 0;
    case TopkWay::kMaxima:
      // k + excluded chunks reach the bound, hence k candidates do.
      return args.k + sizes.excluded <= sizes.maxima;
    default:
      return false;
  }
}

// ---- scratch ------------------------------------------------------------------------------------

// Hands out 16-byte aligned pieces of the caller's memory; from null it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* const piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class K>
struct Scratch {
  TopkFound<K> found;
  TopkSearch<K>* bound;
  TopkTable table;
  TopkTable maxima;
  K* sample;
  int64_t bytes;
};

template <class K>
Scratch<K> make_scratch(const SelectTopkArgs& args, const float* const* maxima, TopkWay way,
                        const int64_t* words, void* base) {
  const Sizes sizes = measure(args, maxima);
  const bool sparse = uses_maxima(args, maxima, sizes, way);
  const bool store = !(is_dense(args, sizes.n) && way == TopkWay::kDigits);
  Scratch<K> s{};
  Carver carver(base);
  s.found.state = carver.take<TopkState>(1);
  s.found.nans = args.nan_is_lowest ? nullptr : carver.take<unsigned long long>(args.count);
  s.bound = carver.take<TopkSearch<K>>(1);
  s.found.threshold = carver.take<TopkSearch<K>>(1);

  s.table.rows = reinterpret_cast<const TopkRow*>(words);
  s.table.count = args.count;
  s.table.n = sizes.n;
  s.table.tiles = sparse ? sizes.sparse_tiles : sizes.dense_tiles;
  s.table.slots = sparse ? kSparseSlots : kTileSlots;
  s.table.tile_tensors = carver.take<int32_t>(s.table.tiles);
  s.table.exclude_starts = args.exclude == nullptr ? nullptr : carver.take<int64_t>(s.table.tiles);
  if (sparse && way == TopkWay::kMaxima) {
    s.maxima.rows = s.table.rows + args.count;
    s.maxima.count = args.count;
    s.maxima.n = sizes.maxima;
    s.maxima.tiles = sizes.maxima_tiles;
    s.maxima.slots = kTileSlots;
    s.maxima.tile_tensors = carver.take<int32_t>(s.maxima.tiles);
  }
  if (is_sampled(way)) s.sample = carver.take<K>(make_strata(sizes.n, way).count);

  s.found.k = args.k;
  s.found.store = store;
  s.found.room = store ? std::min(sizes.n, 2 * args.k + spare_of(sizes.n)) : 0;
  s.found.keys = carver.take<K>(s.found.room);
  s.found.slots = carver.take<uint16_t>(s.found.room);
  const int64_t tiles = s.table.tiles;
  const int64_t groups = (tiles + kGroupTiles - 1) / kGroupTiles;
  s.found.starts = carver.take<int64_t>(tiles);
  s.found.counts = carver.take<uint32_t>(tiles);
  s.found.chosen = carver.take<uint32_t>(tiles);
  s.found.outs = carver.take<int64_t>(tiles);
  s.found.shares = carver.take<uint32_t>(tiles);
  s.found.group_above = carver.take<int64_t>(groups);
  s.found.group_ties = carver.take<int64_t>(groups);
  s.bytes = carver.used();
  return s;
}

// ---- the sequence -------------------------------------------------------------------------------

TopkLaunch make_launch(const Context& context, const SelectTopkArgs& args) {
  TopkLaunch to{};
  use_device(context);
  to.stream = stream_of(context);
  PIECE_OPS_CUDA_CHECK(
      cudaDeviceGetAttribute(&to.multiprocessors, cudaDevAttrMultiProcessorCount, context.device));
  to.formula = {args.score, args.constant, args.seed};
  to.input = args.first[0].dtype == DType::kFloat64 ? TopkInput::kDouble
             : args.score == Score::kRandom         ? TopkInput::kHash
             : score_needs_second(args.score)       ? TopkInput::kTwo
                                                    : TopkInput::kOne;
  return to;
}

template <class K>
void run(const Context& context, const SelectTopkArgs& args, const float* const* maxima,
         TopkWay way, const int64_t* words, const int64_t* check, void* base, TopkReport* report) {
  const TopkLaunch to = make_launch(context, args);
  Scratch<K> s = make_scratch<K>(args, maxima, way, words, base);
  s.table.check = check;
  const int64_t spare = spare_of(s.table.n);
  const int64_t excluded = measure(args, maxima).excluded;
  const int64_t rank = is_sampled(way)           ? sample_rank(args.k, s.table.n, way)
                       : way == TopkWay::kDigits ? args.k
                                                 : args.k + excluded;

  // 1. the bound
  launch_prepare(to, s.table, s.maxima, s.found, s.bound, rank);
  if (is_sampled(way)) {
    if (rank > 0) {
      launch_search_sample(to, s.table, make_strata(s.table.n, way), s.sample, s.bound,
                           s.found.state);
    }
  } else if (way == TopkWay::kDigits) {
    launch_search_scores(to, s.table, s.bound, s.found.state, s.found.store ? spare : 0);
  } else {
    TopkLaunch plain = to;
    plain.formula = {Score::kPlain, 0.0f, 0};
    plain.input = TopkInput::kOne;
    launch_search_scores(plain, s.maxima, s.bound, s.found.state, spare / kChunk);
  }

  // 2. to 4.
  if (s.table.slots == kSparseSlots) {
    if constexpr (sizeof(K) == 4) launch_sparse_filter(to, s.table, s.bound, s.found);
  } else {
    launch_filter(to, s.table, s.bound, s.found);
  }
  if (s.found.store) {
    launch_search_list<K>(to, s.found.keys, &s.found.state->kept, s.found.room, 0,
                          s.found.threshold, s.found.state);
  }
  launch_emit(to, s.table, s.bound, s.found, args.indices, args.counts, report);
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

std::vector<TopkWay> topk_ways(const SelectTopkArgs& args, const float* const* maxima) {
  const Sizes sizes = measure(args, maxima);
  std::vector<TopkWay> ways;
  const bool by_maxima = uses_maxima(args, maxima, sizes, TopkWay::kMaxima);
  const bool dense = is_dense(args, sizes.n);
  const bool samples = args.algorithm == TopkAlgorithm::kFilter ||
                       (args.algorithm == TopkAlgorithm::kAuto && !dense);
  if (samples) ways.push_back(TopkWay::kSample);
  if (by_maxima && !dense) ways.push_back(TopkWay::kMaxima);
  if (samples && sample_rank(args.k, sizes.n, TopkWay::kResample) > 0) {
    ways.push_back(TopkWay::kResample);
  }
  ways.push_back(TopkWay::kDigits);
  return ways;
}

Table make_table(const SelectTopkArgs& args, const float* const* maxima) {
  Table table;
  table.count = args.count;
  int64_t start = 0;
  int64_t dense = 0;
  int64_t sparse = 0;
  for (int64_t t = 0; t < args.count; ++t) {
    TopkRow row = make_row(args, maxima, t);
    row.start = start;
    row.position = args.first_position + start;
    row.dense_tile = dense;
    row.sparse_tile = sparse;
    append(row, &table);
    start += row.n;
    dense += tiles_of(row.n, row.pad, kTileSlots);
    sparse += tiles_of(row.n, 0, kSparseSlots);
  }
  table.tiles = dense;
  if (maxima == nullptr) return table;
  int64_t tiles = 0;
  for (int64_t t = 0; t < args.count; ++t) {
    TopkRow row = maxima_row(make_row(args, maxima, t));
    row.dense_tile = tiles;
    append(row, &table);
    tiles += tiles_of(row.n, row.pad, kTileSlots);
  }
  return table;
}

Table make_exclude_table(const SelectTopkArgs& args) {
  return build_table(
      args.count, kSlotTile, kFirstOwnColumn, [&](int64_t t) { return args.exclude[t].n; },
      [&](int column, int64_t t) {
        return column == kIndices ? address_word(args.exclude[t].data) : args.first[t].n;
      });
}

int64_t scratch_bytes(const SelectTopkArgs& args, const float* const* maxima, TopkWay way) {
  return args.first[0].dtype == DType::kFloat64
             ? make_scratch<uint64_t>(args, maxima, way, nullptr, nullptr).bytes
             : make_scratch<uint32_t>(args, maxima, way, nullptr, nullptr).bytes;
}

void select_topk(const Context& context, const SelectTopkArgs& args, const float* const* maxima,
                 TopkWay way, const int64_t* table, const int64_t* check, void* scratch,
                 TopkReport* report) {
  if (args.first[0].dtype == DType::kFloat64) {
    run<uint64_t>(context, args, maxima, way, table, check, scratch, report);
  } else {
    run<uint32_t>(context, args, maxima, way, table, check, scratch, report);
  }
}

Table make_table_by_tensor(const SelectTopkArgs& args, const int64_t* ks) {
  Table table;
  table.count = args.count;
  int64_t position = args.first_position;
  int64_t out = 0;
  for (int64_t t = 0; t < args.count; ++t) {
    TopkRow row = make_row(args, nullptr, t);
    row.position = position;
    row.k = row.n <= kSmallTopk || ks[t] == 0 ? ks[t] : -1;
    row.out = out;
    append(row, &table);
    position += row.n;
    out += ks[t];
  }
  return table;
}

int64_t topk_row_words() { return kRowWords; }

void select_topk_small(const Context& context, const SelectTopkArgs& args, const int64_t* table,
                       const int64_t* check, TopkReport* reports) {
  if (args.count == 0) return;
  launch_small(make_launch(context, args), reinterpret_cast<const TopkRow*>(table), args.count,
               check, args.nan_is_lowest, args.indices, args.counts, reports);
}

}  // namespace piece_ops::cuda
