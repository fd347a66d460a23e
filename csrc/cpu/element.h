// element.h - one element of a view.
#pragma once

#include <cstdint>

#include "piece_ops/core/view.h"
#include "piece_ops/math/rounding.h"

namespace piece_ops::cpu {

// Calls body with a zero of the unsigned type as wide as the dtype.
template <class Body>
void with_bits(DType dtype, Body body) {
  switch (size_of(dtype)) {
    case 2:
      return body(uint16_t{0});
    case 4:
      return body(uint32_t{0});
    default:
      return body(uint64_t{0});
  }
}

// Element i in float32: exact for the 16-bit types and float32 itself; float64 is not taken.
inline float load_float(const ConstView& view, int64_t i) {
  switch (view.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(view.data)[i];
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(view.data)[i]);
    default:
      return fp16_to_float(static_cast<const uint16_t*>(view.data)[i]);
  }
}

// Element i, rounded to nearest even into the view's dtype; float64 widens.
inline void store_float(const View& view, int64_t i, float x) {
  switch (view.dtype) {
    case DType::kFloat32:
      static_cast<float*>(view.data)[i] = x;
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(view.data)[i] = float_to_bf16(x);
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(view.data)[i] = float_to_fp16(x);
      break;
    case DType::kFloat64:
      static_cast<double*>(view.data)[i] = x;
      break;
  }
}

}  // namespace piece_ops::cpu
