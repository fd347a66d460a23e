// topk_bound.h - a lower bound of the k-th largest score: guessed from a sample, or proven by
// digit histograms. The filter of select_topk.cpp does the rest, and verifies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "topk_source.h"

namespace piece_ops::cpu {

template <class T>
struct Bound {
  Key<T> key;
  bool is_exact;  // the key of the k-th largest score itself
  int64_t passes;
};

// ---- by sample ---------------------------------------------------------------------------------

// The elements are cut into strata of equal length, and one is sampled from each, at a hashed place
// inside it: no stride that data could share, and the same sample on every machine.
struct Strata {
  int64_t length;
  int64_t count;

  // One of 4096 elements; more of a smaller array (8192 in all), more rarely past 2^31. A sampled
  // element costs some 35 ns (a cache and a TLB miss), an element kept needlessly some 10 ns; at
  // 1e8 elements the sum is flat between one of 2048 and one of 8192 for k = 0.1 to 10 %.
  explicit Strata(int64_t n)
      : length(std::max(std::min<int64_t>(std::max<int64_t>(n / 8192, 16), 4096), n >> 19)),
        count((n + length - 1) / length) {}

  int64_t position(int64_t i, int64_t n) const {
    uint64_t h = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull;
    h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull;
    const int64_t begin = i * length;
    const uint64_t own = static_cast<uint64_t>(std::min(length, n - begin));  // below 2^32
    return begin + static_cast<int64_t>(((h >> 32) * own) >> 32);
  }
};

// A key that about k elements and a margin exceed: three standard deviations of the sample's count
// and 4, so that fewer than one selection in 1000 has to look again.
template <class T>
Bound<T> sampled_bound(const SelectTopkArgs& args, const Source<T>& source, int threads,
                       int64_t n) {
  const Strata strata(n);
  const int64_t size = strata.count;
  std::vector<int64_t> ends(static_cast<size_t>(args.count));
  int64_t end = 0;
  for (int64_t t = 0; t < args.count; ++t) ends[t] = end += args.first[t].n;

  std::vector<Key<T>> keys(static_cast<size_t>(size));
  constexpr int64_t kBatch = 64;  // loads in flight: the sample is bound by latency
  parallel_for(size < 4096 ? 1 : threads, (size + kBatch - 1) / kBatch, 16, [&](int, int64_t b) {
    int64_t tensors[kBatch];
    int64_t offsets[kBatch];
    const int64_t begin = b * kBatch;
    const int64_t m = std::min(kBatch, size - begin);
    int64_t t = 0;
    for (int64_t j = 0; j < m; ++j) {
      const int64_t position = strata.position(begin + j, n);
      if (j == 0) t = std::upper_bound(ends.begin(), ends.end(), position) - ends.begin();
      while (ends[t] <= position) ++t;
      tensors[j] = t;
      offsets[j] = position - (ends[t] - args.first[t].n);
      source.prefetch(t, offsets[j]);
    }
    for (int64_t j = 0; j < m; ++j) {
      Key<T> key = to_key(source.at(tensors[j], offsets[j]));
      // An excluded element counts as the lowest.
      if (excluded_in(args, tensors[j], offsets[j], 1).n) key = 0;
      keys[begin + j] = key;
    }
  });

  const double expected =
      static_cast<double>(args.k) * static_cast<double>(size) / static_cast<double>(n);
  const double rank = expected + 3.0 * std::sqrt(expected) + 4.0;
  if (rank >= static_cast<double>(size)) return {0, false, 0};
  const auto nth = keys.begin() + static_cast<int64_t>(std::ceil(rank)) - 1;
  std::nth_element(keys.begin(), nth, keys.end(), std::greater<Key<T>>());
  return {*nth, false, 0};
}

// ---- by digits ---------------------------------------------------------------------------------

// Digits of a key from the top: 12 bits first (sign, exponent and a few bits of fraction spread
// real scores over many bins), then as even as the rest divides.
template <class T>
struct Digits;
template <>
struct Digits<float> {
  static constexpr int kCount = 3;
  static constexpr int kBits[kCount] = {12, 10, 10};
};
template <>
struct Digits<double> {
  static constexpr int kCount = 5;
  static constexpr int kBits[kCount] = {12, 13, 13, 13, 13};
};

// Counts of one digit: four interleaved histograms (a run of one value would wait each time for the
// store before), 32 bits each (64 KiB for 12 bits), widened before they can overflow.
class Histogram {
 public:
  static constexpr int64_t kWays = 4;

  void reset(int64_t bins) {
    pending_ = 0;
    narrow_.assign(static_cast<size_t>(kWays * bins), 0);
    wide_.assign(static_cast<size_t>(bins), 0);
  }
  // Where to count: bin b of way w is [kWays * b + w]. For at most n more counts.
  uint32_t* narrow(int64_t n) {
    if (pending_ + n > int64_t{1} << 31) widen();
    pending_ += n;
    return narrow_.data();
  }
  void remove(int64_t bin) { --wide_[bin]; }
  int64_t count(int64_t bin) const {
    int64_t sum = wide_[bin];
    for (int64_t w = 0; w < kWays; ++w) sum += narrow_[kWays * bin + w];
    return sum;
  }

 private:
  void widen() {
    for (size_t bin = 0; bin < wide_.size(); ++bin) wide_[bin] = count(static_cast<int64_t>(bin));
    std::fill(narrow_.begin(), narrow_.end(), 0u);
    pending_ = 0;
  }

  int64_t pending_ = 0;
  std::vector<uint32_t> narrow_;
  std::vector<int64_t> wide_;
};

// Counts the digit of n keys; with the first digit, whatever their prefix (there is none).
template <bool kFirst, class K>
void count_digits(const K* keys, int64_t n, int prefix_shift, K prefix, int shift, K mask,
                  uint32_t* narrow) {
  for (int64_t j = 0; j < n; ++j) {
    const K key = keys[j];
    if (kFirst || (key >> prefix_shift) == prefix) {
      ++narrow[Histogram::kWays * ((key >> shift) & mask) + (j & (Histogram::kWays - 1))];
    }
  }
}

// Multi-tensor radix select: a histogram of the top digit of every key, the bin that holds the
// k-th largest, then the next digit inside that bin, until the bin holds no more than `enough`
// elements (the filter then finishes) or the key is complete. One read of the scores a digit.
template <class T>
Bound<T> radix_bound(const SelectTopkArgs& args, const Source<T>& source,
                     const std::vector<Tile>& tiles, int threads, int64_t enough) {
  using K = Key<T>;
  constexpr int kWidth = static_cast<int>(sizeof(K)) * 8;
  std::vector<Histogram> histograms(static_cast<size_t>(threads));

  K prefix = 0;       // the digits found so far
  int known = 0;      // how many bits they are
  int64_t above = 0;  // elements whose key is larger than every key with this prefix
  int64_t passes = 0;
  for (int digit = 0; digit < Digits<T>::kCount; ++digit) {
    const int bits = Digits<T>::kBits[digit];
    const int shift = kWidth - known - bits;
    const K mask = (K{1} << bits) - 1;
    const auto matches = [&](K key) { return known == 0 || (key >> (kWidth - known)) == prefix; };
    for (Histogram& histogram : histograms) histogram.reset(int64_t{1} << bits);
    parallel_for(threads, static_cast<int64_t>(tiles.size()), 1, [&](int thread, int64_t i) {
      const Tile& tile = tiles[i];
      Histogram& histogram = histograms[thread];
      uint32_t* narrow = histogram.narrow(tile.n);
      typename Source<T>::Buffers buffers;
      K keys[kBlock];
      for (int64_t begin = 0; begin < tile.n; begin += kBlock) {
        const int64_t m = std::min(kBlock, tile.n - begin);
        source.keys(source.block(tile.tensor, tile.begin + begin, m, buffers), m, keys);
        if (known == 0) {
          count_digits<true>(keys, m, 0, prefix, shift, mask, narrow);
        } else {
          count_digits<false>(keys, m, kWidth - known, prefix, shift, mask, narrow);
        }
      }
      const IndexView excluded = excluded_in(args, tile.tensor, tile.begin, tile.n);
      for (int64_t e = 0; e < excluded.n; ++e) {
        const K key = to_key(source.at(tile.tensor, excluded.data[e]));
        if (matches(key)) histogram.remove((key >> shift) & mask);
      }
    });
    ++passes;

    int64_t bin = int64_t{1} << bits;
    int64_t inside = 0;
    do {
      --bin;
      above += inside;
      inside = 0;
      for (const Histogram& histogram : histograms) inside += histogram.count(bin);
    } while (above + inside < args.k && bin > 0);
    prefix = static_cast<K>(prefix << (known ? bits : 0)) | static_cast<K>(bin);
    known += bits;
    if (known < kWidth && inside <= enough) {
      return {static_cast<K>(prefix << (kWidth - known)), false, passes};
    }
  }
  return {prefix, true, passes};
}

}  // namespace piece_ops::cpu
