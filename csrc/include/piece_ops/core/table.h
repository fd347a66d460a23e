// table.h - what a kernel over many tensors reads instead of arguments: sizes, addresses, tiles.
//
//   words:   | prefix 0 .. count | sizes count | column 0 count | column 1 count | ...     int64
//
// prefix[t] = tiles before tensor t, prefix[count] = all tiles; a tile is tile_size consecutive
// elements of one tensor, its last one shorter. What the columns hold is each op's own business
// (addresses, codes). The table is built on the host, lies on the device in memory that the caller
// owns, and stays valid as long as addresses and sizes do.
#pragma once

#include <cstdint>
#include <vector>

#include "piece_ops/core/check.h"

namespace piece_ops {

// On the host.
struct Table {
  int64_t count = 0;  // tensors
  int64_t tiles = 0;
  int64_t tile_size = 1;
  std::vector<int64_t> words;
};

// On the device; passed to kernels by value.
struct DeviceTable {
  const int64_t* words;
  int64_t count;
  int64_t tiles;
};

// sizes(t): elements of tensor t; column(c, t): its word in column c.
template <class Sizes, class Column>
Table build_table(int64_t count, int64_t tile_size, int columns, Sizes sizes, Column column) {
  Table table;
  table.count = count;
  table.tile_size = tile_size;
  table.words.reserve(static_cast<size_t>((columns + 2) * count + 1));
  for (int64_t t = 0; t < count; ++t) {
    table.words.push_back(table.tiles);
    const int64_t n = sizes(t);
    PIECE_OPS_CHECK(n >= 0, "piece_ops: tensor ", t, " must not have a negative size, got ", n);
    table.tiles += n / tile_size + (n % tile_size != 0);
  }
  table.words.push_back(table.tiles);
  for (int64_t t = 0; t < count; ++t) table.words.push_back(sizes(t));
  for (int c = 0; c < columns; ++c) {
    for (int64_t t = 0; t < count; ++t) table.words.push_back(column(c, t));
  }
  return table;
}

inline int64_t address_word(const void* p) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(p));
}

}  // namespace piece_ops
