// select_topk_verify.h - the end of a filter, dense or sparse: are there enough, and did they fit?
#pragma once

#include "select_topk_types.h"

namespace piece_ops::cuda {

// The last block of the filter to end: the selection's status, and the search for the threshold.
// All threads of all blocks call it. Where the excluded positions are broken no block comes here,
// and what prepare said stays.
template <class K>
__device__ __forceinline__ void verify(const TopkSearch<K>* bound, const TopkFound<K>& found) {
  TopkState& state = *found.state;
  if (!is_last_block(&state.ticket) || threadIdx.x != 0) return;
  const unsigned long long kept = state.kept;
  const bool enough = kept + state.ties >= static_cast<unsigned long long>(found.k);
  const bool fits = !found.store || kept <= static_cast<unsigned long long>(found.room);
  const bool has_nan = found.nans != nullptr && state.first_nan != 0;
  state.status = has_nan          ? TopkReport::kNan
                 : enough && fits ? TopkReport::kFound
                                  : TopkReport::kMissed;
  TopkSearch<K> search{0, 0, 0, found.k, 0, 0};
  if (state.status != TopkReport::kFound) {
    search.done = 1;
  } else if (kept < static_cast<unsigned long long>(found.k)) {  // ties at the bound are needed
    search.prefix = bound->bound();
    search.known = static_cast<int>(sizeof(K)) * 8;
    search.above = static_cast<int64_t>(kept);
    search.done = 1;
  }
  *found.threshold = search;
}

}  // namespace piece_ops::cuda
