// pairs.h - what gather and scatter share: dense tensors, and a value for each selected position.
#pragma once

#include "piece_ops/core/dtype.h"
#include "piece_ops/core/view.h"
#include "slots.h"

namespace piece_ops::cuda {

constexpr int kDense = kFirstOwnColumn;
constexpr int kValues = kFirstOwnColumn + 1;
constexpr int kDTypes = kFirstOwnColumn + 2;  // of the dense tensor, of the values << 8
constexpr int kPairColumns = kFirstOwnColumn + 3;

// For every tile, where dtypes agree copy(slots, dense, values) with both as unsigned integers of
// their size, else convert(slots, dense, its dtype, values), which are float32 then.
template <class Copy, class Convert>
__device__ __forceinline__ void for_each_pair(const DeviceTable& table, Copy copy,
                                              Convert convert) {
  for_each_tile(table, kSlotTile, [&](const Tile& tile) {
    void* dense = table_pointer<void>(table, kDense, tile.tensor);
    void* values = table_pointer<void>(table, kValues, tile.tensor);
    const int64_t dtypes = table_word(table, kDTypes, tile.tensor);
    const auto dtype = static_cast<DType>(dtypes & 0xff);
    const auto copied = [&](auto bits) {
      using Bits = decltype(bits);
      for_each_slot(table, tile, [&](const Slots& slots) {
        copy(slots, static_cast<Bits*>(dense), static_cast<Bits*>(values));
      });
    };
    if (dtype != static_cast<DType>(dtypes >> 8)) {
      for_each_slot(table, tile, [&](const Slots& slots) {
        convert(slots, dense, dtype, static_cast<float*>(values));
      });
    } else if (dtype == DType::kFloat32) {
      copied(uint32_t{});
    } else if (dtype == DType::kFloat64) {
      copied(static_cast<unsigned long long>(0));
    } else {
      copied(uint16_t{});
    }
  });
}

template <class Dense, class Values>
Table make_pair_table(int64_t count, const IndexView* indices, const Dense* dense,
                      const Values* values) {
  return build_table(
      count, kSlotTile, kPairColumns, [&](int64_t t) { return indices[t].n; },
      [&](int column, int64_t t) -> int64_t {
        switch (column) {
          case kIndices:
            return address_word(indices[t].data);
          case kBound:
            return dense[t].n;
          case kDense:
            return address_word(dense[t].data);
          case kValues:
            return address_word(values[t].data);
          default:
            return static_cast<int64_t>(dense[t].dtype) | static_cast<int64_t>(values[t].dtype)
                                                              << 8;
        }
      });
}

}  // namespace piece_ops::cuda
