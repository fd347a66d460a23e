// isa.h - which instruction set the CPU kernels use, and the table of inner loops built for it.
//
// The inner loops are one text (bodies/bodies.inl), compiled once per instruction set; the choice
// is made once per process: the best the CPU has, or what PIECE_OPS_ISA names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "piece_ops/core/dtype.h"
#include "piece_ops/math/adamw.h"
#include "piece_ops/math/score.h"
#include "piece_ops/ops/sampled_weight_grad.h"

namespace piece_ops::cpu {

// Elements that scan() may be given at once: its output of 4-byte positions stays in L1.
constexpr int64_t kBlock = 1024;

struct Products;  // products.h
constexpr int64_t kColumnsAtOnce = 128;
constexpr int64_t kTileRows = 4;
constexpr int64_t kGatherUnit = 16;

struct Bodies {
  // NaN and infinities among n numbers.
  int64_t (*count_nonfinite)(DType dtype, const void* x, int64_t n);
  // square_sums[i] += weight * (g[i] * g[i]); sums[i] += weight * g[i]; either may be null.
  void (*accumulate_squares)(DType dtype, const void* g, float* square_sums, float* sums,
                             float weight, int64_t n);
  // to[r][c] += from[r][c], rows so many floats apart; whether a sum is not finite.
  bool (*add_block)(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                    int64_t rows, int64_t columns);
  // target[i] = bfloat16(target[i] + value[i]), rounded at random by a hash of the key and
  // place + i; whether a sum is not finite.
  bool (*add_rounded)(uint16_t* target, const float* value, uint32_t place, uint32_t key,
                      int64_t n);
  // Widen bfloat16 or float16 to float32, exactly.
  void (*to_float)(DType dtype, const void* x, float* out, int64_t n);
  // out[i] = the score formula; kPlain and kRandom are not evaluated here. out may be first.
  void (*evaluate)(Score score, const float* first, const float* second, float constant, float* out,
                   int64_t n);
  // Positions i, ascending, with x[i] > bound or NaN, and with keep_ties x[i] == bound too;
  // otherwise those are added to *ties. A NaN bound keeps every position. n <= kBlock.
  int64_t (*scan_float)(const float* x, int64_t n, float bound, bool keep_ties, uint32_t* positions,
                        int64_t* ties);
  int64_t (*scan_double)(const double* x, int64_t n, double bound, bool keep_ties,
                         uint32_t* positions, int64_t* ties);
  // keys[i] = to_key(x[i])
  void (*keys_float)(const float* x, int64_t n, uint32_t* keys);
  void (*keys_double)(const double* x, int64_t n, uint64_t* keys);
  // One AdamW step on n consecutive masters.
  void (*adamw)(float* values, float* exp_avgs, float* exp_avg_sqs, const float* grads, int64_t n,
                const AdamwFactors& factors);
  // A panel holds columns of a matrix as rows of one block of tokens in float32, `stride` apart.
  // panel[c * stride + t] = x[t * row_stride + columns[c]], for t < tokens, and zeros up to the
  // next multiple of kSampledLanes. n <= kColumnsAtOnce, tokens <= kSampledBlock; columns increase
  // and are below width.
  void (*transpose_columns)(DType dtype, const void* x, int64_t row_stride, int64_t width,
                            int64_t tokens, const int64_t* columns, int64_t n, float* panel,
                            int64_t stride);
  // out[s] += the sum over a block's tokens of first[a[s]] * second[b[s]], rows of two panels.
  void (*sampled_dots)(const float* first, const int32_t* a, const float* second, const int32_t* b,
                       int64_t stride, int64_t tokens, int64_t n, float* out);
  // out[r * n + c] = the sum over a block's tokens of row r of first times row c of second, for
  // kTileRows rows and n columns.
  void (*dense_dots)(const float* first, const float* second, int64_t stride, int64_t tokens,
                     int64_t n, float* out);
  // out[s] += the sum over a block's tokens of grad[t][a[s]] * input[t][b[s]], of rows of the
  // matrices as they are, of one dtype; of 16-bit ones the columns are even in number. n is a
  // multiple of kGatherUnit; lanes is scratch for kSampledLanes * n floats.
  void (*gathered_dots)(const ConstMatrix& grad, const int32_t* a, const ConstMatrix& input,
                        const int32_t* b, int64_t n, float* lanes, float* out);
  // Reads n_bytes and returns their xor in 8-byte words: the fastest plain read loop there is,
  // the denominator of the benchmarks.
  uint64_t (*read)(const void* data, int64_t n_bytes);
  // Sums of outer products of rows, in float32.
  const Products* products;
};

struct Isa {
  const char* name;
  const Bodies* bodies;
  const Products* pairs;  // products of two bfloat16 matrices; null: bodies->products do them
};

// Those this build holds and this CPU can run, weakest first.
std::vector<Isa> supported_isas();

// The live one. Throws Error if PIECE_OPS_ISA names one that is unknown or not supported.
const Isa& active_isa();

}  // namespace piece_ops::cpu
