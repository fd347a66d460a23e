// sampled_rows.h - sampled_weight_grad where indices are few: rows are read as they are. The header
// of sampled_weight_grad.cpp says why and how fast.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "piece_ops/ops/sampled_weight_grad.h"
#include "scratch.h"

namespace piece_ops::cpu {

// The row and column of positions that come in increasing order; one division a row.
class Walk {
 public:
  explicit Walk(int64_t columns) : columns_(columns) {}
  // True when this position opens a new row.
  bool move_to(int64_t position) {
    const bool is_new = position >= row_end_;
    if (is_new) {
      row_ = position / columns_;
      row_end_ = (row_ + 1) * columns_;
    }
    column_ = position - (row_end_ - columns_);
    return is_new;
  }
  int64_t row() const { return row_; }
  int64_t column() const { return column_; }

 private:
  int64_t columns_;
  int64_t row_ = 0;
  int64_t row_end_ = 0;
  int64_t column_ = 0;
};

// Columns that some index uses, ascending, and which of them each column is.
struct UsedColumns {
  std::vector<int64_t> columns;
  std::vector<int32_t> slot;

  UsedColumns(IndexView indices, int64_t width)
      : columns(static_cast<size_t>(width)), slot(static_cast<size_t>(width), 0) {
    Walk walk(width);
    for (int64_t s = 0; s < indices.n; ++s) {
      walk.move_to(indices.data[s]);
      slot[walk.column()] = 1;
    }
    int32_t n = 0;  // no branch: which columns are used cannot be foreseen
    for (int64_t j = 0; j < width; ++j) {
      const int32_t is_used = slot[j];
      columns[n] = j;
      slot[j] = n;
      n += is_used;
    }
    columns.resize(static_cast<size_t>(n));
  }
  int64_t count() const { return static_cast<int64_t>(columns.size()); }
};

// Indices of which the lanes of a block, 128 bytes each, stay in L2.
constexpr int64_t kMostGathered = 8192;

// What transposing columns takes, in columns of a whole square; they are given in increasing order.
// A column copied by itself counts 2.5: estimated from its instructions, not measured.
class TransposeCost {
 public:
  void add(int64_t column) {
    if (column >= end_) {
      close();
      end_ = column + kSquare;
    }
    ++n_;
  }
  double total() {
    close();
    return sum_;
  }

 private:
  static constexpr int64_t kSquare = 16;
  void close() {
    sum_ += n_ < kSquare / 4 ? 2.5 * static_cast<double>(n_) : static_cast<double>(kSquare);
    n_ = 0;
  }
  int64_t end_ = 0;
  int64_t n_ = 0;
  double sum_ = 0.0;
};

// Does following the indices through the rows cost less than to transpose columns? An index costs
// some 0.9 and reading a column along with its row some 0.45 of what transposing one does: fitted
// to the times in the header.
inline bool gathers(const SampledWeightGradArgs& args, const UsedColumns& used) {
  const ConstMatrix& grads = args.grad_output;
  const ConstMatrix& input = args.input;
  const int64_t n = args.indices.n;
  if (n > std::min(kMostGathered, grads.columns + input.columns)) return false;
  if (grads.dtype != input.dtype) return false;
  // 16-bit elements are gathered in pairs, which must not reach past a row.
  if (grads.dtype != DType::kFloat32 && (grads.columns % 2 != 0 || input.columns % 2 != 0)) {
    return false;
  }
  TransposeCost rows, columns;
  for (const int64_t column : used.columns) columns.add(column);
  Walk walk(input.columns);
  for (int64_t s = 0; s < n; ++s) {
    if (walk.move_to(args.indices.data[s])) rows.add(walk.row());
  }
  const double read = 0.45 * static_cast<double>(grads.columns + input.columns);
  return 0.9 * static_cast<double>(n) + read <= rows.total() + columns.total();
}

// Rounds of blocks of tokens: a thread takes one, or a part of the indices where there are fewer.
inline void add_gathered(const Context& context, const SampledWeightGradArgs& args) {
  const int64_t n = args.indices.n;
  const int64_t padded = (n + kGatherUnit - 1) / kGatherUnit * kGatherUnit;
  const int64_t n_blocks = (args.grad_output.rows + kSampledBlock - 1) / kSampledBlock;
  const int threads =
      usable_threads(context.threads, n_blocks * (padded / kGatherUnit), n * args.grad_output.rows);
  std::vector<int32_t> rows(static_cast<size_t>(padded)), columns(static_cast<size_t>(padded));
  Walk walk(args.input.columns);
  for (int64_t s = 0; s < padded; ++s) {  // the last index again, where none is left
    walk.move_to(args.indices.data[std::min(s, n - 1)]);
    rows[s] = static_cast<int32_t>(walk.row());
    columns[s] = static_cast<int32_t>(walk.column());
  }
  const auto block_of = [](ConstMatrix matrix, int64_t block) {
    const int64_t first = block * kSampledBlock;
    matrix.data =
        static_cast<const char*>(matrix.data) + first * matrix.row_stride * size_of(matrix.dtype);
    matrix.rows = std::min(kSampledBlock, matrix.rows - first);
    return matrix;
  };
  const Bodies& bodies = *active_isa().bodies;
  const int64_t at_once = std::min<int64_t>(threads, n_blocks);
  const Scratch<float> lanes(threads * kSampledLanes * padded);
  const Scratch<float> sums(at_once * padded);
  for (int64_t first = 0; first < n_blocks; first += at_once) {
    const int64_t blocks = std::min(at_once, n_blocks - first);
    const int64_t units = padded / kGatherUnit;
    const int64_t parts = std::max<int64_t>(1, std::min(threads / blocks, units));
    std::fill(sums.data(), sums.data() + blocks * padded, 0.0f);
    parallel_for(threads, blocks * parts, 1, [&](int thread, int64_t task) {
      const int64_t block = task / parts;
      const int64_t begin = task % parts * units / parts * kGatherUnit;
      const int64_t end = (task % parts + 1) * units / parts * kGatherUnit;
      bodies.gathered_dots(block_of(args.grad_output, first + block), rows.data() + begin,
                           block_of(args.input, first + block), columns.data() + begin, end - begin,
                           lanes.data() + thread * kSampledLanes * padded,
                           sums.data() + block * padded + begin);
    });
    const IeeeEnvironment environment;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t s = 0; s < n; ++s) args.values[s] += sums.data()[block * padded + s];
    }
  }
}

}  // namespace piece_ops::cpu
