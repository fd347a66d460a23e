// sampled_weight_grad.cpp - chosen entries of grad_output^T input, without the others.
//
// What       values[s] = sum over tokens t of grad_output[t, i] * input[t, j], in float32, in the
//            order of ops/sampled_weight_grad.h: the bits depend on nothing else.
// Algorithm  An entry is a dot product over tokens, but tokens lie a row apart. Two ways, for a
//            block of 256 tokens; its sum is added to the value, so nothing is carried from block
//            to block but the values.
//            Few indices, in many columns (`gathers`; at random up to 0.6 a column): rows are read
//            as they are, one token after the other; 16 indices gather their two numbers each and
//            add the products to their sums in the token's lane. A lane's sums of all indices come
//            from L2 every 32 tokens; the lanes are added up at the end.
//            More: 1. the columns of input that some index uses are transposed into a panel, a row
//            of 1 KiB each (float32); 2. a run of up to 128 rows of the weight has its columns of
//            grad_output transposed into a second panel, and every index is one dot product of two
//            panel rows: two loads, a multiplication and an addition for 16 tokens.
//            Cold, two threads, 512 tokens, 0.1, 0.5 and 0.75 as many indices as columns of both:
//              576 x 576, bfloat16    rows  43,  65,  96 us   panels  90,  80,  110
//              1536 x 576, float32         125, 183, 235             184, 215,  224
//              4096 x 4096, bfloat16       260, 575, 830             370, 810, 1010
//            Where a few rows and columns hold most indices, little is transposed: 1536 x 576, 884
//            indices in 189 rows and 129 columns, bfloat16: rows 139 us, panels 123.
// Threads    While there is a block for each of them, each takes one, with panels and sums of its
//            own, which are then added in order. A panel that two threads had filled lay half in
//            the other one's cache: 2 threads took 153 us for 1536 x 576 (bfloat16), 1 thread 195,
//            and with panels of their own 2 take 95. For the other blocks, and where input panel or
//            sums pass 2 MiB, they share the input panel and take pieces of the indices; few
//            indices they share where blocks are fewer than threads.
// Transpose  It dominates panels (SmolLM2's 576 x 576, 0.1 %: 258 Ki elements transposed, 170 Ki
//            products), hence squares of 16 x 16 in registers wherever a quarter of the 16 columns
//            is used, element by element elsewhere. 0.08 ns an element in cache, and 0.20 where a
//            panel does not begin with a cache line.
// Full rows  Four rows of the weight of which 40 % or more are wanted are computed whole, in tiles
//            of 4 x 4 dot products (a load serves four products) that are then gathered: same
//            order, same bits. Measured, 1536 x 576, 512 tokens, one Zen 5 core: all entries one by
//            one 23 ms, in tiles 9.6 ms, so the two cross at 0.42; torch's float32 GEMM takes 8.0
//            ms, which is what its fused multiply-add is worth, and would not keep the bits.
// Traffic    Rows: both matrices once. Panels: each used column of both once (nearly all cache
//            lines of them, when 16 neighbours hold one used column), 4 bytes an element to L2 and
//            back. All Linears of SmolLM2, 512 tokens, 0.1 %, two cores of an Intel Xeon
//            (2026-11-28): a plain read of all matrices takes 15 ms in float32 and 8 in bfloat16;
//            44 and 32 all by panels, 34 and 24 by rows where indices are few (the dense GEMMs: 410
//            and 115). The head, 49152 x 576, goes by panels: 100 MB of float32 gradients, 5 ms.
// Tried      Without gain for panels (2026-11-28): 32 tokens of every column together, so that
//            blocks are stored in a row (10 to 15 % slower), loading by 128-bit pieces, which
//            halves the shuffles (none), asking for whole rows ahead (none), panels of 32 columns
//            of grad_output (cold up to 1.5 times slower: pieces of rows are short) or 2048 (1.3).
// Scratch    Few indices: 140 bytes an index and a thread, at most 1.1 MiB. Panels: 4 bytes a used
//            column and a token of a block (16 tokens of padding) for each block held: one a
//            thread, or as many as fit 1 MiB; 143 KB and 4 bytes an index (at most 2 MiB) a thread;
//            12 bytes a column of input. Nothing grows with the weight or the number of blocks.
// Limits     columns of one matrix: 2^31.
#include "piece_ops/ops/sampled_weight_grad.h"

#include <limits>

#include "indices.h"
#include "isa.h"
#include "sampled_rows.h"
#include "scratch.h"

namespace piece_ops::cpu {

namespace {

// Indices that one thread follows before it looks for more.
constexpr int64_t kIndicesAtOnce = 1024;
// Floats of the transposed input, where one block of tokens does not need more: 1 MiB.
constexpr int64_t kPanelFloats = 1 << 18;
// Floats of an input panel of a thread's own, and of its sums, at most: 2 MiB, as a core's L2.
constexpr int64_t kOwnFloats = 1 << 19;

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

// Of a panel's rows: whole vectors of tokens, and one cache line more, since rows of a power of two
// would fall into few sets of L1.
int64_t stride_for(int64_t tokens) {
  const int64_t vectors = (std::min(tokens, kSampledBlock) + kSampledLanes - 1) / kSampledLanes;
  return vectors * kSampledLanes + 16;
}

// What all threads share.
struct Work {
  const Bodies& bodies;
  const SampledWeightGradArgs& args;
  const UsedColumns& used;
  int64_t full;    // indices in kTileRows rows from which on all of their entries are computed
  int64_t stride;  // of the panels' rows
  int64_t input_floats() const { return used.count() * stride; }
  int64_t grad_floats() const { return kColumnsAtOnce * stride; }  // of a thread's panel

  // Transposes these columns of a block of tokens; returns how many tokens it has.
  int64_t transpose(const ConstMatrix& matrix, int64_t block, const int64_t* columns, int64_t n,
                    float* panel) const {
    const int64_t first = block * kSampledBlock;
    const int64_t tokens = std::min(kSampledBlock, matrix.rows - first);
    const char* data =
        static_cast<const char*>(matrix.data) + first * matrix.row_stride * size_of(matrix.dtype);
    bodies.transpose_columns(matrix.dtype, data, matrix.row_stride, matrix.columns, tokens, columns,
                             n, panel, stride);
    return tokens;
  }

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

  int64_t next() const { return begin + n; }

  void add(const Work& work, int64_t block, const float* input_panel, float* panel,
           float* sums) const {
    const int64_t tokens = work.transpose(work.args.grad_output, block, rows, n_rows, panel);
    work.bodies.sampled_dots(panel, row_slots, input_panel, column_slots, work.stride, tokens, n,
                             sums + begin);
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

  int64_t next() const { return end; }

  // A tile of kTileRows rows and so many columns has 4 KiB.
  static constexpr int64_t kTileColumns = 256;

  void add(const Work& work, int64_t block, const float* input_panel, float* panel,
           float* sums) const {
    const int64_t tokens = work.transpose(work.args.grad_output, block, rows, n_rows, panel);
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
        work.bodies.dense_dots(panel + first_row * work.stride, input_panel + c * work.stride,
                               work.stride, tokens, n, tile);
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int64_t row_begin = rows[first_row + r] * width;
          for (int64_t& i = next[r]; i < end; ++i) {
            const int64_t column = work.args.indices.data[i] - row_begin;
            if (column >= width || work.used.slot[column] >= c + n) break;
            sums[i] += tile[r * n + work.used.slot[column] - c];
          }
        }
      }
    }
  }
};

// add(run) for each run of the indices begin .. end - 1.
template <class Add>
void for_each_run(const Work& work, int64_t begin, int64_t end, Add add) {
  const auto added = [&](const auto& run) {
    add(run);
    return run.next();
  };
  while (begin < end) {
    const int64_t row = work.args.indices.data[begin] / work.args.input.columns;
    begin = work.is_full(begin, end, row) ? added(FullRun(work, begin, end))
                                          : added(SparseRun(work, begin, end));
  }
}

// Rounds of a block of tokens a thread, each with an input panel and sums of its own, while there
// is a block for every thread; returns how many blocks that were.
int64_t add_own_blocks(const Work& work, int threads, int64_t n_blocks) {
  const int64_t rounds = n_blocks / threads;
  const int64_t n = work.args.indices.n;
  const int64_t input_floats = work.input_floats();
  if (rounds == 0 || input_floats > kOwnFloats || n > kOwnFloats) return 0;
  const Scratch<float> panels(threads * (input_floats + work.grad_floats()));
  const Scratch<float> sums(threads * n);
  for (int64_t first = 0; first < rounds * threads; first += threads) {
    parallel_for(threads, threads, 1, [&](int, int64_t own) {
      float* const input_panel = panels.data() + own * (input_floats + work.grad_floats());
      float* const grad_panel = input_panel + input_floats;
      float* const own_sums = sums.data() + own * n;
      std::fill(own_sums, own_sums + n, 0.0f);
      for (int64_t c = 0; c < work.used.count(); c += kColumnsAtOnce) {
        work.transpose(work.args.input, first + own, work.used.columns.data() + c,
                       std::min(kColumnsAtOnce, work.used.count() - c),
                       input_panel + c * work.stride);
      }
      for_each_run(work, 0, n, [&](const auto& run) {
        run.add(work, first + own, input_panel, grad_panel, own_sums);
      });
    });
    const IeeeEnvironment environment;
    for (int64_t own = 0; own < threads; ++own) {
      for (int64_t s = 0; s < n; ++s) work.args.values[s] += sums.data()[own * n + s];
    }
  }
  return rounds * threads;
}

// The blocks from `first` on: all threads transpose the input of some of them, then share the
// indices.
void add_shared_blocks(const Work& work, int threads, int64_t first, int64_t n_blocks) {
  const int64_t n = work.args.indices.n;
  const int64_t used = work.used.count();
  const int64_t column_piece = piece_of(used, threads, kColumnsAtOnce);
  // Full rows should not be cut into pieces: four tiles of them make one.
  const int64_t index_piece = piece_of(n, threads, std::max(kIndicesAtOnce, 4 * kTileRows * used));
  const int64_t input_floats = work.input_floats();
  const int64_t at_once =
      std::min(n_blocks - first, std::max<int64_t>(1, kPanelFloats / input_floats));
  const Scratch<float> panels(at_once * input_floats + threads * work.grad_floats());
  float* const grad_panels = panels.data() + at_once * input_floats;

  const int64_t column_pieces = (used + column_piece - 1) / column_piece;
  const int64_t index_pieces = (n + index_piece - 1) / index_piece;
  for (; first < n_blocks; first += at_once) {
    const int64_t blocks = std::min(at_once, n_blocks - first);
    parallel_for(threads, blocks * column_pieces, 1, [&](int, int64_t piece) {
      const int64_t block = piece / column_pieces;
      const int64_t begin = piece % column_pieces * column_piece;
      work.transpose(work.args.input, first + block, work.used.columns.data() + begin,
                     std::min(column_piece, used - begin),
                     panels.data() + block * input_floats + begin * work.stride);
    });
    parallel_for(threads, index_pieces, 1, [&](int thread, int64_t piece) {
      const int64_t begin = piece * index_piece;
      for_each_run(work, begin, std::min(begin + index_piece, n), [&](const auto& run) {
        for (int64_t block = 0; block < blocks; ++block) {
          run.add(work, first + block, panels.data() + block * input_floats,
                  grad_panels + thread * work.grad_floats(), work.args.values);
        }
      });
    });
  }
}

}  // namespace

void sampled_weight_grad(const Context& context, const SampledWeightGradArgs& args) {
  const ConstMatrix& grads = args.grad_output;
  const ConstMatrix& input = args.input;
  const IndexView indices = args.indices;
  check_indices("sampled_weight_grad", "indices", 0, indices, grads.columns * input.columns);
  std::fill(args.values, args.values + indices.n, 0.0f);
  if (indices.n == 0 || grads.rows == 0) return;
  const UsedColumns used(indices, input.columns);
  if (gathers(args, used)) {
    add_gathered(context, args);
    return;
  }

  const Work work{*active_isa().bodies, args, used, full_from(used.count()),
                  stride_for(grads.rows)};
  const int64_t most_rows = std::min(indices.n, grads.columns);
  const int threads = usable_threads(context.threads, indices.n,
                                     (used.count() + most_rows + indices.n / 8) * grads.rows);
  const int64_t n_blocks = (grads.rows + kSampledBlock - 1) / kSampledBlock;
  const int64_t done = threads > 1 ? add_own_blocks(work, threads, n_blocks) : 0;
  if (done < n_blocks) add_shared_blocks(work, threads, done, n_blocks);
}

}  // namespace piece_ops::cpu
