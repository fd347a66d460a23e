// dtype.h - the element types, and the only switch over them.
#pragma once

#include <cstdint>

namespace piece_ops {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int32_t kDTypeCount = 4;

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

}  // namespace piece_ops
