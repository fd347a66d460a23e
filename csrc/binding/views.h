// views.h - lists of addresses and sizes, as Python passes them, to views.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "piece_ops/core/check.h"
#include "piece_ops/core/context.h"
#include "piece_ops/core/view.h"

namespace piece_ops::binding {

using Ints = std::vector<int64_t>;

// dtypes has one code for all tensors, or one each.
template <class AnyView>
std::vector<AnyView> make_views(const Ints& addresses, const Ints& sizes, const Ints& dtypes) {
  PIECE_OPS_CHECK(addresses.size() == sizes.size(), "piece_ops._C: ", addresses.size(),
                  " addresses, but ", sizes.size(), " sizes");
  PIECE_OPS_CHECK(dtypes.size() == 1 || dtypes.size() == addresses.size() || addresses.empty(),
                  "piece_ops._C: ", dtypes.size(), " dtypes for ", addresses.size(), " tensors");
  std::vector<AnyView> views(addresses.size());
  for (size_t t = 0; t < addresses.size(); ++t) {
    const int64_t dtype = dtypes[dtypes.size() == 1 ? 0 : t];
    PIECE_OPS_CHECK(dtype >= 0 && dtype < kDTypeCount, "piece_ops._C: unknown dtype ", dtype);
    PIECE_OPS_CHECK(sizes[t] >= 0 && (addresses[t] != 0 || sizes[t] == 0),
                    "piece_ops._C: null address of tensor ", t);
    views[t] = {reinterpret_cast<void*>(addresses[t]), sizes[t], static_cast<DType>(dtype)};
  }
  return views;
}

inline std::vector<IndexView> make_index_views(const Ints& addresses, const Ints& sizes) {
  PIECE_OPS_CHECK(addresses.size() == sizes.size(), "piece_ops._C: ", addresses.size(),
                  " addresses, but ", sizes.size(), " sizes");
  std::vector<IndexView> views(addresses.size());
  for (size_t t = 0; t < addresses.size(); ++t) {
    views[t] = {reinterpret_cast<const int64_t*>(addresses[t]), sizes[t]};
  }
  return views;
}

inline std::vector<float*> make_pointers(const Ints& addresses) {
  std::vector<float*> pointers(addresses.size());
  for (size_t t = 0; t < addresses.size(); ++t)
    pointers[t] = reinterpret_cast<float*>(addresses[t]);
  return pointers;
}

inline Context cuda_context(int device, uint64_t stream) {
  Context context;
  context.device = device;
  context.stream = reinterpret_cast<void*>(stream);
  return context;
}

// Address, elements from row to row, columns, dtype.
using Matrix = std::tuple<int64_t, int64_t, int64_t, int64_t>;

inline ConstMatrix make_matrix(const Matrix& matrix, int64_t rows) {
  const auto [address, row_stride, columns, dtype] = matrix;
  PIECE_OPS_CHECK(dtype >= 0 && dtype < kDTypeCount, "piece_ops._C: unknown dtype ", dtype);
  PIECE_OPS_CHECK(rows >= 0 && columns >= 0 && (address != 0 || rows * columns == 0),
                  "piece_ops._C: null address of a matrix");
  return {reinterpret_cast<const void*>(address), rows, columns, row_stride,
          static_cast<DType>(dtype)};
}

}  // namespace piece_ops::binding
