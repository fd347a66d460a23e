// std::nth_element as a peer of select_topk: compiled by bench/bench_select_topk.py, not shipped.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

// Positions of the k largest of n scores, ties as they come: the k-th largest of a copy, then one
// scan. 1 <= k <= n.
extern "C" void nth_element_topk(const float* scores, int64_t n, int64_t k, int64_t* positions) {
  std::vector<float> copy(scores, scores + n);
  std::nth_element(copy.begin(), copy.begin() + (k - 1), copy.end(), std::greater<float>());
  const float threshold = copy[k - 1];
  int64_t ties = k - std::count_if(copy.begin(), copy.begin() + k,
                                   [=](float score) { return score > threshold; });
  for (int64_t i = 0; i < n; ++i) {
    if (scores[i] > threshold) {
      *positions++ = i;
    } else if (scores[i] == threshold && ties > 0) {
      *positions++ = i;
      --ties;
    }
  }
}
