// select_topk.h - the k largest of all scores in a list of tensors, exactly, ties by position.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"
#include "piece_ops/core/view.h"
#include "piece_ops/math/score.h"

namespace piece_ops {

enum class TopkAlgorithm : int32_t { kAuto = 0, kFilter = 1, kRadix = 2 };
constexpr int32_t kTopkAlgorithmCount = 3;

struct SelectTopkArgs {
  int64_t count;           // tensors
  const ConstView* first;  // [count] float32, bfloat16, float16 mixed, or all float64 (kPlain only)
  const ConstView* second;   // [count], same sizes, for the formulas that need it; else null
  const IndexView* exclude;  // [count] positions that must not be chosen, or null
  Score score;
  float constant;
  uint64_t seed;           // kRandom
  int64_t first_position;  // kRandom: the position of the first element in the caller's order
  int64_t first_number;    // the number of first[0] in the caller's list, for errors
  int64_t k;               // 0 <= k <= elements - excluded
  bool nan_is_lowest;      // false: report NaN instead of choosing
  TopkAlgorithm algorithm;
  int64_t* indices;  // out [k]: positions inside each tensor, tensor by tensor, increasing
  int64_t* counts;   // out [count]: how many of them belong to each tensor
};

struct SelectTopkResult {
  double threshold = 0.0;   // the k-th largest score; +inf when k == 0
  int64_t ties_kept = 0;    // chosen elements equal to the threshold
  int64_t nan_tensor = -1;  // first tensor with NaN, when those are to be reported; then no output
  int64_t nan_count = 0;
  int64_t passes = 0;  // how often the scores were read from end to end (the sample not counted)
};

namespace cpu {
SelectTopkResult select_topk(const Context& context, const SelectTopkArgs& args);
}  // namespace cpu

}  // namespace piece_ops
