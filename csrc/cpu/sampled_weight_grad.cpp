// sampled_weight_grad.cpp - chosen entries of grad_output^T input, without the others.
#include "piece_ops/ops/sampled_weight_grad.h"

#include <memory>

#include "indices.h"
#include "isa.h"

namespace piece_ops::cpu {

namespace {

// Indices that one thread follows before it looks for more.
constexpr int64_t kIndicesAtOnce = 1024;
// Floats of the transposed input, where one block of tokens does not need more: 1 MiB.
constexpr int64_t kPanelFloats = 1 << 18;

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

  UsedColumns(IndexView indices, int64_t width) : slot(static_cast<size_t>(width), -1) {
    Walk walk(width);
    for (int64_t s = 0; s < indices.n; ++s) {
      walk.move_to(indices.data[s]);
      slot[walk.column()] = 0;
    }
    columns.reserve(static_cast<size_t>(std::min(indices.n, width)));
    for (int64_t j = 0; j < width; ++j) {
      if (slot[j] < 0) continue;
      slot[j] = static_cast<int32_t>(columns.size());
      columns.push_back(j);
    }
  }
  int64_t count() const { return static_cast<int64_t>(columns.size()); }
};

// Four pieces a thread, in whole vectors, at most `most`.
int64_t piece_of(int64_t n, int threads, int64_t most) {
  const int64_t share = (n + 4 * threads - 1) / (4 * threads);
  return std::min(most, (share + 15) / 16 * 16);
}

// Returns the tokens of the block.
int64_t transpose(const Bodies& bodies, const ConstMatrix& matrix, int64_t block,
                  const int64_t* columns, int64_t n, float* panel) {
  const int64_t first = block * kSampledBlock;
  const int64_t tokens = std::min(kSampledBlock, matrix.rows - first);
  const char* data =
      static_cast<const char*>(matrix.data) + first * matrix.row_stride * size_of(matrix.dtype);
  bodies.transpose_columns(matrix.dtype, data, matrix.row_stride, matrix.columns, tokens, columns,
                           n, panel);
  return tokens;
}

// The positions that a thread follows at once: at most kColumnsAtOnce rows of the weight.
struct Run {
  int64_t rows[kColumnsAtOnce];
  int32_t row_slots[kIndicesAtOnce];
  int32_t column_slots[kIndicesAtOnce];
  int64_t n_rows;
  int64_t n;

  void fill(const int64_t* positions, int64_t count, const UsedColumns& used) {
    Walk walk(static_cast<int64_t>(used.slot.size()));
    n_rows = 0;
    for (n = 0; n < count && n < kIndicesAtOnce; ++n) {
      if (walk.move_to(positions[n])) {
        if (n_rows == kColumnsAtOnce) break;
        rows[n_rows++] = walk.row();
      }
      row_slots[n] = static_cast<int32_t>(n_rows - 1);
      column_slots[n] = used.slot[walk.column()];
    }
  }
};

}  // namespace

void sampled_weight_grad(const Context& context, const SampledWeightGradArgs& args) {
  const ConstMatrix& grads = args.grad_output;
  const ConstMatrix& input = args.input;
  const IndexView indices = args.indices;
  check_indices("sampled_weight_grad", "indices", 0, indices, grads.columns * input.columns);
  std::fill(args.values, args.values + indices.n, 0.0f);
  if (indices.n == 0 || grads.rows == 0) return;

  const Bodies& bodies = *active_isa().bodies;
  const UsedColumns used(indices, input.columns);
  const int64_t most_rows = std::min(indices.n, grads.columns);
  const int threads = usable_threads(context.threads, indices.n,
                                     (used.count() + most_rows + indices.n / 8) * grads.rows);
  const int64_t column_piece = piece_of(used.count(), threads, kColumnsAtOnce);
  const int64_t index_piece = piece_of(indices.n, threads, kIndicesAtOnce);

  // Blocks of tokens whose input lies transposed at the same time.
  const int64_t n_blocks = (grads.rows + kSampledBlock - 1) / kSampledBlock;
  const int64_t block_floats = used.count() * kPanelStride;
  const int64_t blocks_at_once =
      std::min(n_blocks, std::max<int64_t>(1, kPanelFloats / block_floats));
  const int64_t own_floats = kColumnsAtOnce * kPanelStride;
  const std::unique_ptr<float[]> panels(
      new float[static_cast<size_t>(blocks_at_once * block_floats + threads * own_floats)]);
  float* const own_panels = panels.get() + blocks_at_once * block_floats;

  const int64_t column_pieces = (used.count() + column_piece - 1) / column_piece;
  const int64_t index_pieces = (indices.n + index_piece - 1) / index_piece;
  for (int64_t first = 0; first < n_blocks; first += blocks_at_once) {
    const int64_t blocks = std::min(blocks_at_once, n_blocks - first);
    parallel_for(threads, blocks * column_pieces, 1, [&](int, int64_t piece) {
      const int64_t block = piece / column_pieces;
      const int64_t begin = piece % column_pieces * column_piece;
      transpose(bodies, input, first + block, used.columns.data() + begin,
                std::min(column_piece, used.count() - begin),
                panels.get() + block * block_floats + begin * kPanelStride);
    });
    parallel_for(threads, index_pieces, 1, [&](int thread, int64_t piece) {
      Run run;
      float* const panel = own_panels + thread * own_floats;
      int64_t s = piece * index_piece;
      const int64_t end = std::min(s + index_piece, indices.n);
      for (; s < end; s += run.n) {
        run.fill(indices.data + s, end - s, used);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t tokens =
              transpose(bodies, grads, first + block, run.rows, run.n_rows, panel);
          bodies.sampled_dots(panel, run.row_slots, panels.get() + block * block_floats,
                              run.column_slots, tokens, run.n, args.values + s);
        }
      }
    });
  }
}

}  // namespace piece_ops::cpu
