// topk_source.h - the scores of a selection, block by block, whether stored or computed on the fly.
//
// Source<float> serves float32, bfloat16 and float16 (widening is exact) and every score formula;
// Source<double> serves stored float64 scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "element.h"
#include "isa.h"
#include "parallel.h"
#include "piece_ops/math/ordered_bits.h"
#include "piece_ops/ops/select_topk.h"

namespace piece_ops::cpu {

template <class T>
class Source;

template <>
class Source<double> {
 public:
  Source(const SelectTopkArgs& args, const Bodies& bodies) : args_(args), bodies_(bodies) {}

  struct Buffers {};

  const double* block(int64_t tensor, int64_t begin, int64_t, Buffers&) const {
    return static_cast<const double*>(args_.first[tensor].data) + begin;
  }
  double at(int64_t tensor, int64_t i) const {
    return static_cast<const double*>(args_.first[tensor].data)[i];
  }
  void prefetch(int64_t tensor, int64_t i) const {
    __builtin_prefetch(static_cast<const double*>(args_.first[tensor].data) + i);
  }
  int64_t scan(const double* x, int64_t n, double bound, bool keep_ties, uint32_t* positions,
               int64_t* ties) const {
    return bodies_.scan_double(x, n, bound, keep_ties, positions, ties);
  }
  void keys(const double* x, int64_t n, uint64_t* out) const { bodies_.keys_double(x, n, out); }

 private:
  const SelectTopkArgs& args_;
  const Bodies& bodies_;
};

template <>
class Source<float> {
 public:
  Source(const SelectTopkArgs& args, const Bodies& bodies) : args_(args), bodies_(bodies) {
    if (args.score == Score::kRandom) {
      starts_.resize(static_cast<size_t>(args.count));
      int64_t start = args.first_position;
      for (int64_t t = 0; t < args.count; ++t) {
        starts_[t] = start;
        start += args.first[t].n;
      }
    }
  }

  // L1-resident room for one block of each input.
  struct Buffers {
    float first[kBlock];
    float second[kBlock];
  };

  // n <= kBlock scores from element `begin` of the tensor: in place where they are stored as
  // float32, else in the buffers.
  const float* block(int64_t tensor, int64_t begin, int64_t n, Buffers& buffers) const {
    if (args_.score == Score::kRandom) {
      const int64_t start = starts_[tensor] + begin;
      for (int64_t i = 0; i < n; ++i) buffers.first[i] = score_random(args_.seed, start + i);
      return buffers.first;
    }
    const float* first = widened(args_.first[tensor], begin, n, buffers.first);
    if (args_.score == Score::kPlain) return first;
    const float* second = nullptr;
    if (score_needs_second(args_.score)) {
      second = widened(args_.second[tensor], begin, n, buffers.second);
    }
    bodies_.evaluate(args_.score, first, second, args_.constant, buffers.first, n);
    return buffers.first;
  }

  float at(int64_t tensor, int64_t i) const {
    if (args_.score == Score::kRandom) return score_random(args_.seed, starts_[tensor] + i);
    const float first = load_float(args_.first[tensor], i);
    const bool two = score_needs_second(args_.score);
    const float second = two ? load_float(args_.second[tensor], i) : 0.0f;
    return evaluate_score(args_.score, first, second, args_.constant);
  }
  void prefetch(int64_t tensor, int64_t i) const {
    const ConstView& first = args_.first[tensor];
    __builtin_prefetch(static_cast<const char*>(first.data) + i * size_of(first.dtype));
    if (score_needs_second(args_.score)) {
      const ConstView& second = args_.second[tensor];
      __builtin_prefetch(static_cast<const char*>(second.data) + i * size_of(second.dtype));
    }
  }
  int64_t scan(const float* x, int64_t n, float bound, bool keep_ties, uint32_t* positions,
               int64_t* ties) const {
    return bodies_.scan_float(x, n, bound, keep_ties, positions, ties);
  }
  void keys(const float* x, int64_t n, uint32_t* out) const { bodies_.keys_float(x, n, out); }

 private:
  const float* widened(const ConstView& view, int64_t begin, int64_t n, float* buffer) const {
    if (view.dtype == DType::kFloat32) return static_cast<const float*>(view.data) + begin;
    bodies_.to_float(view.dtype, static_cast<const uint16_t*>(view.data) + begin, buffer, n);
    return buffer;
  }

  const SelectTopkArgs& args_;
  const Bodies& bodies_;
  std::vector<int64_t> starts_;  // kRandom: global position of each tensor's first element
};

// The excluded positions of one tensor inside [begin, begin + n).
inline IndexView excluded_in(const SelectTopkArgs& args, int64_t tensor, int64_t begin, int64_t n) {
  if (args.exclude == nullptr) return {nullptr, 0};
  const IndexView& all = args.exclude[tensor];
  const int64_t* first = std::lower_bound(all.data, all.data + all.n, begin);
  const int64_t* last = std::lower_bound(first, all.data + all.n, begin + n);
  return {first, last - first};
}

}  // namespace piece_ops::cpu
