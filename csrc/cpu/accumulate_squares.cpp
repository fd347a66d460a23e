// accumulate_squares.cpp - adds the squares (and sums) of gradients to float32 accumulators.
//
// What       square_sums += weight * (g * g), sums += weight * g, in float32 as written; a NaN or
//            infinite gradient anywhere in the call: nothing is added (docs/contracts.md).
// Algorithm  1. one pass over the gradients alone looks for a full exponent; 2. one pass over
//            tiles of 64 Ki elements adds. The look-ahead is what "nothing is added" costs: an
//            addition in floating point cannot be taken back bit for bit.
// Traffic    bfloat16, squares only: read 2 + 2 (look-ahead) + 4, write 4 = 12 bytes an element,
//            of which 10 are the op itself. Bound: memory.
// Scratch    none.  Determinism  bitwise, any thread count: elements are independent.
// Limits     none on sizes or the number of tensors.
#include "piece_ops/ops/accumulate_squares.h"

#include <atomic>

#include "isa.h"
#include "parallel.h"

namespace piece_ops::cpu {

namespace {

const void* offset(const ConstView& view, int64_t begin) {
  return static_cast<const char*>(view.data) + begin * size_of(view.dtype);
}

}  // namespace

NonFinite accumulate_squares(const Context& context, const AccumulateSquaresArgs& args) {
  const Bodies& bodies = *active_isa().bodies;
  const std::vector<Tile> tiles =
      make_tiles(args.count, [&](int64_t t) { return args.grads[t].n; });
  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  const int threads = usable_threads(context.threads, n_tiles, elements_of(tiles));

  std::atomic<int64_t> worst{args.count};  // the first tensor with a bad gradient
  parallel_for(threads, n_tiles, 1, [&](int, int64_t i) {
    const Tile& tile = tiles[i];
    const ConstView& grad = args.grads[tile.tensor];
    if (!bodies.count_nonfinite(grad.dtype, offset(grad, tile.begin), tile.n)) return;
    int64_t seen = worst.load();
    while (tile.tensor < seen && !worst.compare_exchange_weak(seen, tile.tensor)) {
    }
  });
  NonFinite bad;
  if (worst.load() < args.count) {
    const ConstView& grad = args.grads[worst.load()];
    bad.tensor = worst.load();
    bad.count = bodies.count_nonfinite(grad.dtype, grad.data, grad.n);
    return bad;
  }

  parallel_for(threads, n_tiles, 1, [&](int, int64_t i) {
    const Tile& tile = tiles[i];
    const ConstView& grad = args.grads[tile.tensor];
    float* square_sums = args.square_sums ? args.square_sums[tile.tensor] + tile.begin : nullptr;
    float* sums = args.sums ? args.sums[tile.tensor] + tile.begin : nullptr;
    bodies.accumulate_squares(grad.dtype, offset(grad, tile.begin), square_sums, sums, args.weight,
                              tile.n);
  });
  return bad;
}

}  // namespace piece_ops::cpu
