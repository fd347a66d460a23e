// indices.h - the check every op makes before it follows a caller's positions.
#pragma once

#include <cstdint>

#include "piece_ops/core/check.h"
#include "piece_ops/core/view.h"

namespace piece_ops::cpu {

// Throws unless indices are strictly increasing and inside 0 .. n-1: a position out of range would
// write foreign memory, a repeated one would make threads collide. Costs one read of the indices.
inline void check_indices(const char* op, const char* name, int64_t tensor, IndexView indices,
                          int64_t n) {
  int64_t previous = -1;
  for (int64_t s = 0; s < indices.n; ++s) {
    const int64_t i = indices.data[s];
    PIECE_OPS_CHECK(i >= 0 && i < n, "piece_ops.", op, ": ", name, "[", tensor, "] must be in 0..",
                    n - 1, ", got ", i, " at slot ", s);
    PIECE_OPS_CHECK(i > previous, "piece_ops.", op, ": ", name, "[", tensor,
                    "] must be strictly increasing, got ", i, " after ", previous, " at slot ", s);
    previous = i;
  }
}

}  // namespace piece_ops::cpu
