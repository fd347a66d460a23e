// select_topk.cpp - the k largest of all scores in a list of tensors, exactly.
//
// What       larger score first, equal scores by smaller position in the caller's order; NaN is
//            reported, or ranks below -inf; -0 equals +0 (docs/contracts.md#select_topk).
// Algorithm  1. bound: a lower bound of the k-th largest, guessed from a deterministic sample
//               ("filter", topk_bound.h) or proven by digit histograms ("radix").
//            2. filter: one read of everything; keeps (key, position) of what exceeds the bound,
//               counts what equals it. Ties at the bound are only counted, so data with few
//               distinct values costs no more than any other.
//            3. verify: kept + ties >= k, and kept within its room. On a miss (3 standard
//               deviations of the sample; or a caller who knows the hash) "auto" goes by radix,
//               whose bound cannot miss.
//            4. finish: the exact k-th largest among the kept, some 1.8 k of them; then positions
//               are copied out tile by tile. A tile of which ties at the bound are needed is read
//               again; ties are granted to the first tiles, so that is k elements and a few.
//            A dense selection (k > n / 4) keeps nothing: radix to the last digit, then two reads.
//            "auto" is "filter" but for dense ones.
// Traffic    4 bytes an element of float32 read once, + 0.4 % for the sample, + 24 bytes a
//            selected one. Bound: memory. The read floor is 4 bytes an element.
// Scratch    8 bytes (float64: 12) a kept element, 40 a tile of 64 Ki elements, sample 0.02 %.
// Determinism  the result is defined by the scores alone; threads, tiles and instruction set only
//            change who finds it.
// Limits     2^63 - 1 elements, any number of tensors.
// Source     bound and verify: Floyd & Rivest, CACM 18(3), 1975; digits: Alabi et al., JEA 17,
//            2012.
#include "piece_ops/ops/select_topk.h"

#include <atomic>
#include <functional>
#include <limits>
#include <vector>

#include "indices.h"
#include "topk_bound.h"

namespace piece_ops::cpu {

namespace {

// What the filter found in one tile.
struct Found {
  int64_t kept = 0;         // keys above the bound
  int64_t ties = 0;         // keys equal to it
  int64_t start = 0;        // where the kept ones lie in the thread's list
  int64_t chosen = 0;       // finish: how many of the tile are selected,
  int64_t chosen_ties = 0;  // of which this many equal the threshold
  int32_t thread = 0;
};

template <class K>
struct KeptList {
  std::vector<K> keys;
  std::vector<uint32_t> positions;  // inside the tile
};

template <class T>
class Selector {
  using K = Key<T>;

 public:
  Selector(const Context& context, const SelectTopkArgs& args)
      : args_(args),
        source_(args, *active_isa().bodies),
        tiles_(make_tiles(args.count, [&](int64_t t) { return args.first[t].n; })),
        n_(elements_of(tiles_)),
        threads_(usable_threads(context.threads, static_cast<int64_t>(tiles_.size()), n_)),
        found_(tiles_.size()),
        kept_(static_cast<size_t>(threads_)) {}

  SelectTopkResult run() {
    SelectTopkResult result;
    const bool is_dense = args_.k > n_ / 4 && n_ > kSerialElements;
    bool by_sample = args_.algorithm == TopkAlgorithm::kFilter ||
                     (args_.algorithm == TopkAlgorithm::kAuto && !is_dense);
    Bound<T> bound{};
    for (;;) {
      // Room for the kept: what the sample expects and 0.8 % of all; more is a miss.
      const int64_t spare = n_ / 128 + 4096;
      bound = by_sample ? sampled_bound(args_, source_, threads_, n_)
                        : radix_bound(args_, source_, tiles_, threads_, is_dense ? 0 : spare);
      result.passes += bound.passes;
      const bool store = !(is_dense && bound.is_exact);
      filter(bound.key, store, 2 * args_.k + spare);
      result.passes += 1;
      if (find_nan(&result)) return result;
      const bool enough = total_kept_ + total_ties_ >= args_.k;
      if (enough && !overflow_.load()) break;
      if (!by_sample) fail(ErrorKind::kInternal, "piece_ops.select_topk: the radix bound missed");
      by_sample = false;
    }
    finish(bound.key, &result);
    emit(result.ties_kept > 0 && threshold_ == bound.key);
    result.threshold = static_cast<double>(from_key<T>(threshold_));
    return result;
  }

 private:
  // Calls visit(position in the tile, key) for every candidate of the tile whose key is above the
  // bound, or with keep_ties equal to it; returns the number of candidates equal to it that were
  // not visited. NaN is counted in *nans.
  template <class Visit>
  int64_t scan_tile(const Tile& tile, K bound_key, bool keep_ties, int64_t* nans, Visit visit) {
    const T bound = from_key<T>(bound_key);
    const IndexView excluded = excluded_in(args_, tile.tensor, tile.begin, tile.n);
    typename Source<T>::Buffers buffers;
    uint32_t positions[kBlock];
    int64_t ties = 0;
    int64_t next_excluded = 0;
    for (int64_t begin = 0; begin < tile.n; begin += kBlock) {
      const int64_t m = std::min(kBlock, tile.n - begin);
      const T* x = source_.block(tile.tensor, tile.begin + begin, m, buffers);
      const int64_t hits = source_.scan(x, m, bound, keep_ties, positions, &ties);
      for (int64_t h = 0; h < hits; ++h) {
        const K key = to_key(x[positions[h]]);
        if (key == 0) ++*nans;
        const int64_t position = begin + positions[h];
        if (excluded.n) {
          const int64_t absolute_position = tile.begin + position;
          while (next_excluded < excluded.n && excluded.data[next_excluded] < absolute_position) {
            ++next_excluded;
          }
          if (next_excluded < excluded.n && excluded.data[next_excluded] == absolute_position) {
            continue;
          }
        }
        // The scan compares values, which a NaN bound cannot; the keys decide.
        if (key > bound_key || (keep_ties && key == bound_key)) {
          visit(position, key);
        } else if (key == bound_key) {
          ++ties;
        }
      }
    }
    if (!keep_ties && bound == bound) {
      // The scan counted ties without looking at the exclusions.
      for (int64_t e = 0; e < excluded.n; ++e) {
        ties -= to_key(source_.at(tile.tensor, excluded.data[e])) == bound_key;
      }
    }
    return ties;
  }

  void filter(K bound, bool store, int64_t room) {
    for (auto& list : kept_) {
      list.keys.clear();
      list.positions.clear();
      if (!store) continue;
      // What the sample expects, so that the lists hardly ever move; untouched pages cost nothing.
      const size_t expected = static_cast<size_t>(2 * args_.k / threads_ + 4096);
      list.keys.reserve(expected);
      list.positions.reserve(expected);
    }
    nans_.clear();
    nans_.resize(static_cast<size_t>(threads_));
    overflow_ = false;
    std::atomic<int64_t> kept{0};
    std::atomic<int64_t> ties{0};
    parallel_for(threads_, static_cast<int64_t>(tiles_.size()), 1, [&](int thread, int64_t i) {
      if (overflow_.load(std::memory_order_relaxed)) return;
      KeptList<K>& list = kept_[thread];
      Found found;
      found.thread = thread;
      found.start = static_cast<int64_t>(list.keys.size());
      int64_t nans = 0;
      found.ties = scan_tile(tiles_[i], bound, false, &nans, [&](int64_t position, K key) {
        ++found.kept;
        if (!store) return;
        list.keys.push_back(key);
        list.positions.push_back(static_cast<uint32_t>(position));
      });
      found_[i] = found;
      if (nans) nans_[thread].push_back({tiles_[i].tensor, nans});
      ties += found.ties;
      // An overflow ends this pass early; a NaN it did not reach is found by the next one.
      if ((kept += found.kept) > room && store) overflow_ = true;
    });
    stored_ = store;
    total_kept_ = kept.load();
    total_ties_ = ties.load();
  }

  bool find_nan(SelectTopkResult* result) {
    if (args_.nan_is_lowest || overflow_.load()) return false;
    for (const auto& list : nans_) {
      for (const auto& [tensor, count] : list) {
        if (result->nan_tensor < 0 || tensor < result->nan_tensor) {
          result->nan_tensor = tensor;
          result->nan_count = 0;
        }
        if (tensor == result->nan_tensor) result->nan_count += count;
      }
    }
    return result->nan_tensor >= 0;
  }

  // The k-th largest kept key, all of which exceed `low`: a histogram of 4096 ranges finds the
  // range it lies in, std::nth_element finishes on the few keys there. Two passes over the kept.
  K kth_of_kept(K low, int64_t k) const {
    constexpr int kBinBits = 12;
    constexpr K kHigh = KeyType<T>::kSign | KeyType<T>::kInfinity;  // the key of +inf
    int shift = 0;
    while ((kHigh - low) >> shift >= K{1} << kBinBits) ++shift;
    std::vector<int64_t> histogram(size_t{1} << kBinBits);
    for (const auto& list : kept_) {
      for (const K key : list.keys) ++histogram[(key - low) >> shift];
    }
    K bin = (kHigh - low) >> shift;
    while (k > histogram[bin]) k -= histogram[bin--];
    std::vector<K> inside;
    inside.reserve(static_cast<size_t>(histogram[bin]));
    for (const auto& list : kept_) {
      for (const K key : list.keys) {
        if ((key - low) >> shift == bin) inside.push_back(key);
      }
    }
    const auto nth = inside.begin() + (k - 1);
    std::nth_element(inside.begin(), nth, inside.end(), std::greater<K>());
    return *nth;
  }

  // The exact threshold, and each tile's share.
  void finish(K bound, SelectTopkResult* result) {
    const int64_t k = args_.k;
    threshold_ = total_kept_ >= k ? kth_of_kept(bound, k) : bound;
    if (threshold_ != bound) {  // it lies among the kept: what of each tile is above, what equal
      parallel_for(threads_, static_cast<int64_t>(tiles_.size()), 16, [&](int, int64_t i) {
        Found& found = found_[i];
        const K* keys = kept_[found.thread].keys.data() + found.start;
        int64_t above = 0;
        int64_t ties = 0;
        for (int64_t j = 0; j < found.kept; ++j) {
          above += keys[j] > threshold_;
          ties += keys[j] == threshold_;
        }
        found.chosen = above;
        found.chosen_ties = ties;
      });
    } else {
      for (Found& found : found_) {
        found.chosen = found.kept;
        found.chosen_ties = found.ties;
      }
    }
    int64_t quota = k;  // ties are granted in the caller's order
    for (const Found& found : found_) quota -= found.chosen;
    result->ties_kept = quota;
    for (Found& found : found_) {
      found.chosen_ties = std::min(found.chosen_ties, quota);
      quota -= found.chosen_ties;
      found.chosen += found.chosen_ties;
    }
  }

  void emit(bool ties_at_bound) {
    std::vector<int64_t> starts(tiles_.size());
    int64_t end = 0;
    std::fill(args_.counts, args_.counts + args_.count, int64_t{0});
    for (size_t i = 0; i < tiles_.size(); ++i) {
      starts[i] = end;
      end += found_[i].chosen;
      args_.counts[tiles_[i].tensor] += found_[i].chosen;
    }
    parallel_for(threads_, static_cast<int64_t>(tiles_.size()), 16, [&](int, int64_t i) {
      const Tile& tile = tiles_[i];
      const Found& found = found_[i];
      if (!found.chosen) return;
      int64_t* out = args_.indices + starts[i];
      int64_t ties_left = found.chosen_ties;
      const auto choose = [&](int64_t position, K key) {
        if (key > threshold_ || (key == threshold_ && ties_left-- > 0)) {
          *out++ = tile.begin + position;
        }
      };
      if (!stored_ || (ties_at_bound && found.chosen_ties)) {
        int64_t nans = 0;
        scan_tile(tile, threshold_, true, &nans, choose);
        return;
      }
      const K* keys = kept_[found.thread].keys.data() + found.start;
      const uint32_t* positions = kept_[found.thread].positions.data() + found.start;
      if (found.chosen_ties && !ties_at_bound) {
        for (int64_t j = 0; j < found.kept; ++j) choose(positions[j], keys[j]);
        return;
      }
      // No tie to count: without a branch, since half of the kept are chosen at random. Every
      // position is written, the next one over it unless it was chosen; the loop ends with the last
      // chosen one, so no write passes the tile's share.
      int64_t chosen = 0;
      for (int64_t j = 0; chosen < found.chosen; ++j) {
        out[chosen] = tile.begin + positions[j];
        chosen += keys[j] > threshold_;
      }
    });
  }

  const SelectTopkArgs& args_;
  const Source<T> source_;
  const std::vector<Tile> tiles_;
  const int64_t n_;
  const int threads_;
  std::vector<Found> found_;
  std::vector<KeptList<K>> kept_;
  std::vector<std::vector<std::pair<int64_t, int64_t>>> nans_;  // by thread: tensor, count
  std::atomic<bool> overflow_{false};
  bool stored_ = true;
  int64_t total_kept_ = 0;
  int64_t total_ties_ = 0;
  K threshold_ = 0;
};

}  // namespace

SelectTopkResult select_topk(const Context& context, const SelectTopkArgs& args) {
  int64_t candidates = 0;
  for (int64_t t = 0; t < args.count; ++t) {
    candidates += args.first[t].n;
    if (!args.exclude) continue;
    check_indices("select_topk", "exclude", args.first_number + t, args.exclude[t],
                  args.first[t].n);
    candidates -= args.exclude[t].n;
  }
  PIECE_OPS_CHECK(args.k >= 0 && args.k <= candidates, "piece_ops.select_topk: k must be in 0..",
                  candidates, " (the number of candidates), got ", args.k);
  if (args.k == 0) {
    std::fill(args.counts, args.counts + args.count, int64_t{0});
    SelectTopkResult none;
    none.threshold = std::numeric_limits<double>::infinity();
    return none;
  }
  const IeeeEnvironment environment;  // for what this thread does between the parallel loops
  // All float64, or none (checked by the caller).
  const bool is_double = args.first[0].dtype == DType::kFloat64;
  return is_double ? Selector<double>(context, args).run() : Selector<float>(context, args).run();
}

}  // namespace piece_ops::cpu
