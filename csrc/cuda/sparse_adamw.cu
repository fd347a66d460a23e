// sparse_adamw.cu - one AdamW step on the selected weights of many tensors, in place, one launch.
//
// What       for every slot s with i = indices[s]:
//              (values, exp_avgs, exp_avg_sqs)[s] <- adamw_step(..., grads)      (math/adamw.h)
//              weight[i] <- values[s], rounded to nearest even into the weight's dtype
//            grads hold one number a slot, or the dense gradient, which is then read at i.
// Algorithm  one warp takes tiles of 1024 slots; a lane reads 4 positions, then 4 gradients,
//            masters and moments, computes, and writes 4 of each. Everything k-sized is coalesced.
// Traffic    per slot, compact float32 gradients: read index 8 + grad 4 + 12, write 12, and one
//            32-byte sector of the weight in and out: 100 bytes (dense gradients: 128). Llama-8B,
//            k = 8 M: 0.8 GB, predicted 0.2 ms on an H200 (4.0 TB/s), against 177 GB and 44 ms for
//            dense AdamW (22 bytes a weight).
// Scratch    the table.  Determinism  bitwise, the same bits as the CPU: no contraction
//            (--fmad=false), IEEE division and square root. (The payload of a NaN may differ.)
// Limits     positions were checked before (check_indices). unchecked: nothing changed them since.
// Source     Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2.
#include "element.h"
#include "piece_ops/ops/sparse_adamw.h"
#include "slots.h"

namespace piece_ops::cuda {

namespace {

constexpr int kWeight = kFirstOwnColumn;
constexpr int kValues = kFirstOwnColumn + 1;
constexpr int kGrad = kFirstOwnColumn + 2;
constexpr int kExpAvg = kFirstOwnColumn + 3;
constexpr int kExpAvgSq = kFirstOwnColumn + 4;
constexpr int kCodes = kFirstOwnColumn + 5;  // dtype of the weight | of the grad << 8 | dense << 16
constexpr int kColumns = kFirstOwnColumn + 6;

// ---- kernel -------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    sparse_adamw_kernel(DeviceTable table, AdamwFactors factors) {
  for_each_tile(table, kSlotTile, [&](const Tile& tile) {
    const int64_t t = tile.tensor;
    void* weight = table_pointer<void>(table, kWeight, t);
    float* values = table_pointer<float>(table, kValues, t);
    const void* grads = table_pointer<const void>(table, kGrad, t);
    float* exp_avgs = table_pointer<float>(table, kExpAvg, t);
    float* exp_avg_sqs = table_pointer<float>(table, kExpAvgSq, t);
    const int64_t codes = table_word(table, kCodes, t);
    const auto weight_dtype = static_cast<DType>(codes & 0xff);
    const auto grad_dtype = static_cast<DType>((codes >> 8) & 0xff);
    const bool is_dense = (codes >> 16) != 0;
    for_each_slot(table, tile, [&](const Slots& slots) {
      float g[kUnroll];
      float p[kUnroll];
      float m[kUnroll];
      float v[kUnroll];
      slots.each([&](int u, int64_t s, int64_t position) {
        g[u] = load_float(grads, grad_dtype, is_dense ? position : s);
        p[u] = values[s];
        m[u] = exp_avgs[s];
        v[u] = exp_avg_sqs[s];
      });
      slots.each([&](int u, int64_t s, int64_t position) {
        adamw_step(p[u], m[u], v[u], g[u], factors);
        values[s] = p[u];
        exp_avgs[s] = m[u];
        exp_avg_sqs[s] = v[u];
        store_float(weight, weight_dtype, position, p[u]);
      });
    });
  });
}

}  // namespace

// ---- launcher -----------------------------------------------------------------------------------

Table make_table(const SparseAdamwArgs& args) {
  return build_table(
      args.count, kSlotTile, kColumns, [&](int64_t t) { return args.indices[t].n; },
      [&](int column, int64_t t) -> int64_t {
        switch (column) {
          case kIndices:
            return address_word(args.indices[t].data);
          case kBound:
            return args.weights[t].n;
          case kWeight:
            return address_word(args.weights[t].data);
          case kValues:
            return address_word(args.values[t]);
          case kGrad:
            return address_word(args.grads[t].data);
          case kExpAvg:
            return address_word(args.exp_avgs[t]);
          case kExpAvgSq:
            return address_word(args.exp_avg_sqs[t]);
          default:
            return static_cast<int64_t>(args.weights[t].dtype) |
                   static_cast<int64_t>(args.grads[t].dtype) << 8 |
                   (args.grads[t].n != args.indices[t].n ? int64_t{1} << 16 : 0);
        }
      });
}

void sparse_adamw(const Context& context, const DeviceTable& table, const AdamwFactors& factors) {
  use_device(context);
  launch_over_tiles(sparse_adamw_kernel, context, table, factors);
}

}  // namespace piece_ops::cuda
