// sparse_adamw.cpp - one AdamW step on the selected weights of many tensors, in place.
//
// What       for every slot s with i = indices[s]:
//              (values, exp_avgs, exp_avg_sqs)[s] <- adamw_step(..., grads)      (math/adamw.h)
//              weight[i] <- values[s], rounded to nearest even into the weight's dtype
//            grads hold one number a slot, or the dense gradient, which is then read at i.
// Algorithm  tiles of 4096 slots: gather or widen the gradients into 16 KiB of stack, one
//            vectorised AdamW loop over the contiguous masters and moments, one scatter loop.
// Traffic    per slot, float32, compact gradients: read 8 (index) + 4 (grad) + 12, write 12, and
//            one 64-byte line of the weight in and out: 164 bytes, 0.16 bytes a weight at 0.1 %,
//            against 28 bytes a weight for dense AdamW. Bound: memory latency.
// Scratch    none on the heap.  Determinism  bitwise, any thread count: positions differ.
// Source     Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2.
#include "piece_ops/ops/sparse_adamw.h"

#include "element.h"
#include "indices.h"
#include "isa.h"

namespace piece_ops::cpu {

void sparse_adamw(const Context& context, const SparseAdamwArgs& args) {
  const Bodies& bodies = *active_isa().bodies;
  const auto size = [&](int64_t t) { return args.weights[t].n; };
  for_each_slot_tile(context, "sparse_adamw_", args.count, args.indices, size,
                     [&](const Tile& tile, const int64_t* index) {
                       const int64_t t = tile.tensor;
                       const ConstView& grad = args.grads[t];
                       float* values = args.values[t] + tile.begin;

                       float wide[kSlotTile];
                       const float* g = wide;
                       if (grad.n != args.indices[t].n) {  // dense
                         for (int64_t s = 0; s < tile.n; ++s) wide[s] = load_float(grad, index[s]);
                       } else if (grad.dtype == DType::kFloat32) {
                         g = static_cast<const float*>(grad.data) + tile.begin;
                       } else {
                         bodies.to_float(grad.dtype,
                                         static_cast<const uint16_t*>(grad.data) + tile.begin, wide,
                                         tile.n);
                       }
                       bodies.adamw(values, args.exp_avgs[t] + tile.begin,
                                    args.exp_avg_sqs[t] + tile.begin, g, tile.n, args.factors);
                       for (int64_t s = 0; s < tile.n; ++s)
                         store_float(args.weights[t], index[s], values[s]);
                     });
}

}  // namespace piece_ops::cpu
