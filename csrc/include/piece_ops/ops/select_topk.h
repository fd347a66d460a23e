// select_topk.h - the k largest of all scores in a list of tensors, exactly, ties by position.
#pragma once

#include <cstdint>
#include <vector>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"
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

// The CUDA backend works in launches that report once, to memory on the device: the caller looks at
// the report and, when the selection missed, tries the next way. Pointers of args are the device's;
// args.indices and args.counts too.
namespace cuda {

struct TopkReport {
  static constexpr int64_t kFound = 0;
  static constexpr int64_t kMissed = 1;  // try the next way
  static constexpr int64_t kNan = 2;     // nan_tensor, nan_count
  static constexpr int64_t kBroken = 3;  // excluded positions are wrong: check
  double threshold;
  int64_t ties_kept;
  int64_t status;
  int64_t nan_tensor;
  int64_t nan_count;
  int64_t kept;   // scores above the bound,
  int64_t ties;   // equal to it
  int64_t check;  // the word of check_indices
};

// How the bound comes about. A way reads the scores kSample and kResample once, kMaxima once (those
// chunks that can matter), kDigits twice to four times; samples can miss, kMaxima too where chunks
// are few or full.
enum class TopkWay : int32_t { kSample = 0, kMaxima = 1, kDigits = 2, kResample = 3 };
constexpr int32_t kTopkWayCount = 4;

// maxima: null, or [count] addresses of (n + 31) / 32 floats on the device: the largest score of
// every 32 consecutive elements, NaN if one is NaN (cuda::ChunkMaxima of accumulate_squares).

// The ways to try, in this order; the last one cannot miss. k > 0.
std::vector<TopkWay> topk_ways(const SelectTopkArgs& args, const float* const* maxima);

// One selection over all tensors; write_table (ops/device.h) brings it to the device.
Table make_table(const SelectTopkArgs& args, const float* const* maxima);
// For check_indices: the excluded positions, and what they must be below.
Table make_exclude_table(const SelectTopkArgs& args);
int64_t scratch_bytes(const SelectTopkArgs& args, const float* const* maxima, TopkWay way);
// check: null, or the report of check_indices on the excluded positions, on the device.
void select_topk(const Context& context, const SelectTopkArgs& args, const float* const* maxima,
                 TopkWay way, const int64_t* table, const int64_t* check, void* scratch,
                 TopkReport* report);

// A selection of each tensor by itself: tensors of at most kSmallTopk elements in one launch, with
// a report each; for a larger one, select_topk with args of that one tensor and its words of the
// table.
constexpr int64_t kSmallTopk = 65536;
Table make_table_by_tensor(const SelectTopkArgs& args, const int64_t* ks);
int64_t topk_row_words();
void select_topk_small(const Context& context, const SelectTopkArgs& args, const int64_t* table,
                       const int64_t* check, TopkReport* reports);

}  // namespace cuda

}  // namespace piece_ops
