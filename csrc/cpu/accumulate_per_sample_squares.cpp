// accumulate_per_sample_squares.cpp - squares of every sample's weight gradient, tile by tile.
//
// What       square_sums += sum_n (scale_n G_n^T X_n)^2, sums += sum_n scale_n G_n^T X_n, where
//            the rows offsets[n] .. offsets[n + 1] - 1 of G [tokens, out] and X [tokens, in] are
//            sample n's. A number that is not finite anywhere: nothing is added.
// Algorithm  1. One read of G and X looks for full exponents. 2. X is packed into panels as wide
//            as a register tile (products.h), so that a step of the inner loop reads consecutive
//            words; 16-bit types become float32 there, or stay pairs of bfloat16 where the CPU
//            multiplies those (AVX-512, AMX). 3. A task packs a block of G's columns, and goes over
//            X's panels; for each, over the samples, and over the block's tiles. A tile's sums over
//            a sample stay in registers, are squared there and added to a block of 18 KiB in L1;
//            the block is added to the accumulators once all samples are through. A sample of more
//            than kSteps words is cut, its unfinished sums kept in a second block meanwhile.
// Traffic    2 tokens out in flops, as the ordinary weight gradient; the accumulators are read
//            and written once: 8 (16 with sums) bytes for 2 x tokens flops. Bound: arithmetic,
//            from some 100 tokens on. 1536 x 576, 4096 tokens, one thread (Zen 5, 230 Gflop/s in
//            float32): 212 Gflop/s, of 34 ms packing takes 4 and the look for NaN 1; bfloat16 445.
//            The squares of samples of 64 tokens cost 15 % more, of 16 tokens 30 %.
//            AMX (Sapphire Rapids, one thread, the core's twin busy with AMX too, 2026-11-28):
//            576 x 576, 512 tokens of bfloat16: samples of 64 606 Gflop/s, one of 512 790; by pairs
//            93; the ordinary gradient by oneDNN 970. Of the time 61 % is in tiles, 18 % in adding
//            blocks to the accumulators, 10 % in packing, 5 % in the look for NaN.
//            Since then accumulators are asked for while the panel is multiplied that is added to
//            them: 8 to 17 % less in bfloat16, 7 to 9 % in float32 (60 M accumulators, 512 tokens,
//            two threads). What is written is looked at for an overflow, which is cheaper than to
//            read it again (3 to 4 % of a pass over a model).
// Scratch    X packed, at most kScratchWords at a time (else the work is done by column blocks),
//            and for each thread a block of G, 4 x 96 bytes a token.
// Determinism  bitwise, any thread count: each element's additions have one order, by tokens, then
//            by samples. AVX2 and AVX-512 fuse multiplication and addition, the portable loop
//            does not, and pairs of bfloat16 are added as the instructions do.
#include "piece_ops/ops/accumulate_per_sample_squares.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "products.h"
#include "scratch.h"

namespace piece_ops::cpu {

namespace {

constexpr int64_t kSteps = 128;     // of a segment: a panel's 48 columns of it, 24 KiB, stay in L1
constexpr int64_t kBlockRows = 96;  // of a task: 96 x 48 sums in float32 are 18 KiB
constexpr int64_t kScratchWords = int64_t{1} << 24;  // 64 MiB of packed X

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Consecutive tokens of one sample, and where their words lie in every packed panel.
struct Segment {
  int64_t token, tokens;
  int64_t step, steps;
  bool begins, ends;  // the sample
  float scale;
};

std::vector<Segment> make_segments(const AccumulatePerSampleSquaresArgs& args,
                                   const Products& products) {
  const int64_t step = products.step;
  std::vector<Segment> segments;
  int64_t steps = 0;
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t begin = args.offsets[n], end = args.offsets[n + 1];
    for (int64_t token = begin; token < end; token += kSteps * step) {
      Segment segment{};
      segment.token = token;
      segment.tokens = std::min(kSteps * step, end - token);
      segment.step = steps;
      segment.steps = round_up(ceil_div(segment.tokens, step), products.steps);
      segment.begins = token == begin;
      segment.ends = token + segment.tokens == end;
      segment.scale = args.scales ? args.scales[n] : 1.0f;
      segments.push_back(segment);
      steps += segment.steps;
    }
  }
  return segments;
}

const void* element(const TokenMatrix& x, int64_t token, int64_t feature) {
  return static_cast<const char*>(x.data) + (token * x.stride + feature) * size_of(x.dtype);
}

// The look for numbers that are not finite, in tasks of some kTile elements.
class Look {
 public:
  Look(const AccumulatePerSampleSquaresArgs& args, int64_t tokens)
      : matrices_{&args.grad_output, &args.input}, tokens_(tokens) {
    for (int m = 0; m < 2; ++m) {
      at_once_[m] = std::max<int64_t>(1, kTile / std::max<int64_t>(1, matrices_[m]->features));
      tasks_[m] = ceil_div(tokens, at_once_[m]);
    }
  }

  int64_t tasks() const { return tasks_[0] + tasks_[1]; }

  void run(int64_t task) {
    const int m = task >= tasks_[0];
    const TokenMatrix& x = *matrices_[m];
    const int64_t begin = (task - m * tasks_[0]) * at_once_[m];
    const int64_t end = std::min(tokens_, begin + at_once_[m]);
    const int64_t rows = x.stride == x.features ? end - begin : 1;
    int64_t count = 0;
    for (int64_t t = begin; t < end; t += rows) {
      count += active_isa().bodies->count_nonfinite(x.dtype, element(x, t, 0), rows * x.features);
    }
    if (count) counts_[m] += count;
  }

  NonFinite found() const {
    for (int m = 0; m < 2; ++m) {
      if (counts_[m].load()) return {m, counts_[m].load()};
    }
    return {};
  }

 private:
  const TokenMatrix* matrices_[2];
  int64_t tokens_, at_once_[2], tasks_[2];
  std::atomic<int64_t> counts_[2] = {{0}, {0}};
};

// Asks for a piece of a row of an accumulator.
void fetch_row(const float* to, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(to + c, 1);
  __builtin_prefetch(to + columns - 1, 1);
}

// Columns [begin, end) of X: packed once, then every block of G's columns against them.
class ColumnBlock {
 public:
  ColumnBlock(const Context& context, const AccumulatePerSampleSquaresArgs& args,
              const Products& products, const std::vector<Segment>& segments, int64_t begin,
              int64_t end)
      : context_(context),
        args_(args),
        products_(products),
        segments_(segments),
        begin_(begin),
        end_(end),
        steps_(segments.back().step + segments.back().steps),
        panels_(ceil_div(end - begin, products.columns)),
        packed_(panels_ * panel_words()) {}

  int64_t panels() const { return panels_; }
  bool overflowed() const { return overflowed_; }

  void pack(int64_t panel) {
    const int64_t column = begin_ + panel * products_.columns;
    const int64_t width = std::min(products_.columns, end_ - column);
    uint32_t* words = packed_.data() + panel * panel_words();
    for (const Segment& segment : segments_) {
      products_.pack_columns(args_.input.dtype, element(args_.input, segment.token, column),
                             args_.input.stride, segment.tokens, width,
                             words + segment.step * products_.columns, panel_words());
    }
  }

  void multiply() {
    const int64_t out = args_.grad_output.features;
    // Four tasks a thread even out their ends; few rows are shared by parts of the panels.
    const int64_t wanted = 4 * context_.threads;
    const int64_t rows = std::clamp(round_up(ceil_div(out, wanted), products_.rows), products_.rows,
                                    round_up(kBlockRows, products_.rows));
    const int64_t blocks = ceil_div(out, rows);
    const int64_t parts = std::min(panels_, ceil_div(wanted, blocks));
    const int threads =
        usable_threads(context_.threads, blocks * parts, steps_ * (end_ - begin_) * out / 64);
    parallel_for(threads, blocks * parts, 1, [&](int, int64_t task) {
      const int64_t part = task % parts, first = task / parts * rows;
      add_rows(first, std::min(rows, out - first), panels_ * part / parts,
               panels_ * (part + 1) / parts);
    });
  }

 private:
  int64_t panel_words() const { return steps_ * products_.columns; }

  // The gradient's rows [first, first + rows) at some panels.
  void add_rows(int64_t first, int64_t rows, int64_t panel, int64_t panels_end) {
    const int64_t tiles = ceil_div(rows, products_.rows);
    const int64_t size = products_.rows * products_.columns, block_rows = tiles * products_.rows;
    // The accumulators' lines, a row apart so that the hardware does not foresee them, are asked
    // for some at a time, while the panel is multiplied that will be added there.
    const int64_t rows_a_tile = ceil_div(2 * rows, tiles * static_cast<int64_t>(segments_.size()));
    // A segment's words of all tiles lie together: they are read in one go, from L3 when T is long.
    const Scratch<uint32_t> packed(steps_ * block_rows);
    for (const Segment& segment : segments_) {
      products_.pack_rows(args_.grad_output.dtype, element(args_.grad_output, segment.token, first),
                          args_.grad_output.stride, segment.tokens, rows,
                          packed.data() + segment.step * block_rows,
                          segment.steps * products_.rows);
    }
    // One more, by turns for all tiles of a sample that is not cut: less to keep in L1.
    const Scratch<float> blocks((3 * tiles + 1) * size);
    float* const partial = blocks.data();
    float* const whole = partial + tiles * size;
    float* const square_sums = args_.square_sums ? whole + size : nullptr;
    float* const sums = args_.sums ? whole + (1 + tiles) * size : nullptr;
    const auto add_block = active_isa().bodies->add_block;
    if (products_.begin) products_.begin();
    for (; panel < panels_end; ++panel) {
      if (square_sums) std::fill_n(square_sums, tiles * size, 0.0f);
      if (sums) std::fill_n(sums, tiles * size, 0.0f);
      const int64_t column = begin_ + panel * products_.columns;
      const int64_t width = std::min(products_.columns, end_ - column);
      const int64_t in = args_.input.features, at = first * in + column;
      int64_t fetched = 0;
      const auto fetch = [&](int64_t end) {
        for (; fetched < std::min(rows, end); ++fetched) {
          if (args_.square_sums) fetch_row(args_.square_sums + at + fetched * in, width);
          if (args_.sums) fetch_row(args_.sums + at + fetched * in, width);
        }
      };
      const uint32_t* columns = packed_.data() + panel * panel_words();
      TileOut previous{};
      for (const Segment& segment : segments_) {
        const uint32_t* rows_of_segment = packed.data() + segment.step * block_rows;
        TileOut out{segment.begins, segment.ends, nullptr, segment.scale, square_sums, sums};
        const bool is_whole = segment.begins && segment.ends;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          fetch(fetched + rows_a_tile);
          out.partial = is_whole ? whole : partial + tile * size;
          products_.tile(rows_of_segment, columns + segment.step * products_.columns, segment.steps,
                         out, previous.partial ? &previous : nullptr);
          previous = out;
          rows_of_segment += segment.steps * products_.rows;
          if (out.square_sums) out.square_sums += size;
          if (out.sums) out.sums += size;
        }
      }
      if (products_.finish) products_.finish(previous);
      const auto add = [&](float* to, const float* block) {
        if (add_block(to + at, in, block, products_.columns, rows, width)) overflowed_ = true;
      };
      if (sums) add(args_.sums, sums);
      if (square_sums) add(args_.square_sums, square_sums);
    }
    if (products_.end) products_.end();
  }

  const Context& context_;
  const AccumulatePerSampleSquaresArgs& args_;
  const Products& products_;
  const std::vector<Segment>& segments_;
  int64_t begin_, end_, steps_, panels_;
  Scratch<uint32_t> packed_;
  std::atomic<bool> overflowed_{false};
};

}  // namespace

NonFinite accumulate_per_sample_squares(const Context& context,
                                        const AccumulatePerSampleSquaresArgs& args) {
  const int64_t tokens = args.offsets[args.samples];
  const int64_t out = args.grad_output.features, in = args.input.features;
  const bool is_bfloat16 =
      args.grad_output.dtype == DType::kBFloat16 && args.input.dtype == DType::kBFloat16;
  const Products* pairs = is_bfloat16 ? active_isa().pairs : nullptr;
  const Products& products = pairs ? *pairs : *active_isa().bodies->products;
  const std::vector<Segment> segments = make_segments(args, products);
  Look look(args, tokens);
  // The look and the packing share one parallel region: waking threads is what small layers feel.
  const auto look_and_pack = [&](bool looks, ColumnBlock* block) {
    const int64_t first = looks ? look.tasks() : 0, n_tasks = first + (block ? block->panels() : 0);
    const int threads = usable_threads(context.threads, n_tasks, tokens * (out + in));
    parallel_for(threads, n_tasks, 1, [&](int, int64_t task) {
      task < first ? look.run(task) : block->pack(task - first);
    });
  };
  if (segments.empty() || out == 0 || in == 0) {
    look_and_pack(true, nullptr);
    return look.found();
  }
  const int64_t steps = segments.back().step + segments.back().steps;
  const int64_t panels = std::max<int64_t>(8, kScratchWords / (steps * products.columns));
  const int64_t width = panels * products.columns;
  for (int64_t begin = 0; begin < in; begin += width) {
    ColumnBlock block(context, args, products, segments, begin, std::min(in, begin + width));
    look_and_pack(begin == 0, &block);
    if (look.found().count) break;
    block.multiply();
    if (args.overflowed && block.overflowed()) *args.overflowed = true;
  }
  return look.found();
}

}  // namespace piece_ops::cpu
