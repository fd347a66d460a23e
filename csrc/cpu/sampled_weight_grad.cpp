// sampled_weight_grad.cpp - chosen entries of grad_output^T input, without the others.
//
// What       values[s] = sum over tokens t of grad_output[t, i] * input[t, j], in float32, in the
//            order of ops/sampled_weight_grad.h: the bits depend on nothing else.
// Algorithm  An entry is a dot product over tokens, but tokens lie a row apart. So, for a block of
//            256 tokens: 1. the columns of input that some index uses are transposed into a panel,
//            a row of 1 KiB each (float32); 2. threads take pieces of the indices; a run of up to
//            128 rows of the weight has its columns of grad_output transposed into a panel of the
//            thread's own, and every index is one dot product of two panel rows: two loads, a
//            multiplication and an addition for 16 tokens. The block's sum is added to the value,
//            so nothing is carried from block to block but the values themselves.
//            Transposing dominates (SmolLM2's 576 x 576, 0.1 %: 258 Ki elements transposed, 170 Ki
//            products), hence 16 x 16 blocks in registers wherever a quarter of the 16 columns is
//            used, element by element elsewhere.
// Full rows  Four rows of the weight of which 40 % or more are wanted are computed whole, in tiles
//            of 4 x 4 dot products (a load serves four products) that are then gathered: same
//            order, same bits. Measured, 1536 x 576, 512 tokens, one Zen 5 core: all entries one by
//            one 23 ms, in tiles 9.6 ms, so the two cross at 0.42; torch's float32 GEMM takes 8.0
//            ms, which is what its fused multiply-add is worth, and would not keep the bits.
// Traffic    each used column of both matrices once (nearly all cache lines of them, when 16
//            neighbours hold one used column), 4 bytes an element to L2 and back. Bound:
//            transposing while the matrices are in cache, memory for the large ones (a head of
//            49152 x 576 reads 100 MB of float32 gradients). Predicted for all Linears of SmolLM2,
//            512 tokens, 0.1 %, two cores: 84 Mi elements at 0.7 cycles, 10 ms, plus 3 to 5 ms of
//            memory; measured 15.3 ms float32, 12.3 ms bfloat16 (the dense GEMMs: 680 and 165 ms).
// Scratch    1088 bytes a used column for each block held (one, or as many as fit 1 MiB), 143 KB a
//            thread, 12 bytes a column of input. Nothing grows with the weight or the tokens.
// Limits     columns of one matrix: 2^31.
#include "piece_ops/ops/sampled_weight_grad.h"

#include <limits>
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

// Four pieces a thread, in whole vectors, at most `most`.
int64_t piece_of(int64_t n, int threads, int64_t most) {
  const int64_t share = (n + 4 * threads - 1) / (4 * threads);
  return std::min(most, (share + 15) / 16 * 16);
}

// From this share on, computing every entry of kTileRows rows is faster (see the header), unless so
// few columns are used that a tile would be mostly empty.
constexpr double kFullShare = 0.4;
constexpr int64_t kFullColumns = 16;

int64_t full_from(int64_t used_columns) {
  if (used_columns < kFullColumns) return std::numeric_limits<int32_t>::max();
  return static_cast<int64_t>(kFullShare * static_cast<double>(kTileRows * used_columns));
}

// Transposes these columns of a block of tokens; returns how many tokens it has.
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

// What all threads share.
struct Work {
  const Bodies& bodies;
  const SampledWeightGradArgs& args;
  const UsedColumns& used;
  int64_t full;  // indices in kTileRows rows from which on all of their entries are computed

  // Do kTileRows rows from this position on, the first of its row, hold so many?
  bool is_full(int64_t s, int64_t end, int64_t row) const {
    const int64_t last = s + full - 1;
    return last < end && row + kTileRows <= args.grad_output.columns &&
           args.indices.data[last] < (row + kTileRows) * args.input.columns;
  }
};

// Indices that a thread follows one by one, of at most kColumnsAtOnce rows of the weight.
struct SparseRun {
  int64_t rows[kColumnsAtOnce];
  int32_t row_slots[kIndicesAtOnce];
  int32_t column_slots[kIndicesAtOnce];
  int64_t n_rows = 0;
  int64_t begin;
  int64_t n = 0;

  SparseRun(const Work& work, int64_t first, int64_t end) : begin(first) {
    Walk walk(work.args.input.columns);
    for (; n < kIndicesAtOnce && begin + n < end; ++n) {
      if (walk.move_to(work.args.indices.data[begin + n])) {
        if (n_rows == kColumnsAtOnce || (n > 0 && work.is_full(begin + n, end, walk.row()))) break;
        rows[n_rows++] = walk.row();
      }
      row_slots[n] = static_cast<int32_t>(n_rows - 1);
      column_slots[n] = work.used.slot[walk.column()];
    }
  }

  void add(const Work& work, int64_t block, const float* input_panel, float* panel) const {
    const int64_t tokens =
        transpose(work.bodies, work.args.grad_output, block, rows, n_rows, panel);
    work.bodies.sampled_dots(panel, row_slots, input_panel, column_slots, tokens, n,
                             work.args.values + begin);
  }
};

// Rows of the weight, kTileRows at a time, of which every entry is computed.
struct FullRun {
  int64_t rows[kColumnsAtOnce];
  int64_t n_rows = 0;
  int64_t begin;
  int64_t end;

  FullRun(const Work& work, int64_t first, int64_t last) : begin(first), end(first) {
    const int64_t* const positions = work.args.indices.data;
    const int64_t width = work.args.input.columns;
    int64_t row = positions[begin] / width;
    while (n_rows < kColumnsAtOnce && end < last && positions[end] / width == row &&
           work.is_full(end, last, row)) {
      for (int64_t r = 0; r < kTileRows; ++r) rows[n_rows++] = row++;
      end = std::lower_bound(positions + end, positions + last, row * width) - positions;
    }
  }

  // A tile of kTileRows rows and so many columns has 4 KiB.
  static constexpr int64_t kTileColumns = 256;

  void add(const Work& work, int64_t block, const float* input_panel, float* panel) const {
    const int64_t tokens =
        transpose(work.bodies, work.args.grad_output, block, rows, n_rows, panel);
    const int64_t width = work.args.input.columns;
    float tile[kTileRows * kTileColumns];
    int64_t s = begin;
    for (int64_t first_row = 0; first_row < n_rows; first_row += kTileRows) {
      int64_t next[kTileRows];  // the first index of each row whose tile is still to come
      for (int64_t r = 0; r < kTileRows; ++r) {
        next[r] = s;
        while (s < end && work.args.indices.data[s] < (rows[first_row + r] + 1) * width) ++s;
      }
      for (int64_t c = 0; c < work.used.count(); c += kTileColumns) {
        const int64_t n = std::min(kTileColumns, work.used.count() - c);
        work.bodies.dense_dots(panel + first_row * kPanelStride, input_panel + c * kPanelStride,
                               tokens, n, tile);
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int64_t row_begin = rows[first_row + r] * width;
          for (int64_t& i = next[r]; i < end; ++i) {
            const int64_t column = work.args.indices.data[i] - row_begin;
            if (column >= width || work.used.slot[column] >= c + n) break;
            work.args.values[i] += tile[r * n + work.used.slot[column] - c];
          }
        }
      }
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

  const UsedColumns used(indices, input.columns);
  const Work work{*active_isa().bodies, args, used, full_from(used.count())};
  const int64_t most_rows = std::min(indices.n, grads.columns);
  const int threads = usable_threads(context.threads, indices.n,
                                     (used.count() + most_rows + indices.n / 8) * grads.rows);
  const int64_t column_piece = piece_of(used.count(), threads, kColumnsAtOnce);
  // Full rows should not be cut into pieces: four tiles of them make one.
  const int64_t index_piece =
      piece_of(indices.n, threads, std::max(kIndicesAtOnce, 4 * kTileRows * used.count()));

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
      transpose(work.bodies, input, first + block, used.columns.data() + begin,
                std::min(column_piece, used.count() - begin),
                panels.get() + block * block_floats + begin * kPanelStride);
    });
    parallel_for(threads, index_pieces, 1, [&](int thread, int64_t piece) {
      const int64_t end = std::min((piece + 1) * index_piece, indices.n);
      const auto add_blocks = [&](const auto& run) {
        for (int64_t block = 0; block < blocks; ++block) {
          run.add(work, first + block, panels.get() + block * block_floats,
                  own_panels + thread * own_floats);
        }
      };
      for (int64_t s = piece * index_piece; s < end;) {
        if (work.is_full(s, end, indices.data[s] / input.columns)) {
          const FullRun run(work, s, end);
          add_blocks(run);
          s = run.end;
        } else {
          const SparseRun run(work, s, end);
          add_blocks(run);
          s += run.n;
        }
      }
    });
  }
}

}  // namespace piece_ops::cpu
