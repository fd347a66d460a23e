// view.h - what an op sees of a tensor: address, element count, element type. Owned by the caller.
#pragma once

#include <cstdint>

#include "piece_ops/core/dtype.h"

namespace piece_ops {

struct ConstView {
  const void* data;
  int64_t n;
  DType dtype;
};

struct View {
  void* data;
  int64_t n;
  DType dtype;
};

// Rows of consecutive elements; row r begins row_stride * r elements after data.
struct ConstMatrix {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  DType dtype;
};

// Flat positions inside one tensor, strictly increasing.
struct IndexView {
  const int64_t* data;
  int64_t n;
};

}  // namespace piece_ops
