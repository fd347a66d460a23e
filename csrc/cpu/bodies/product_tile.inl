// product_tile.inl - the register tile of products.h, over a Simd: Vector, kLanes, load, store,
// broadcast, multiply_add. Included in the namespace of each instruction set.
//
// One row of a tile is kVectors vectors; a step takes kVectors loads, kRows broadcasts and
// kRows * kVectors multiply-adds, all sums in registers. Every element is one chain of additions
// in the order of the tokens, so its bits do not depend on the tile's size.

namespace piece_ops::cpu::PIECE_OPS_ISA_NAMESPACE {
namespace {

template <class Simd, int kRows, int kVectors>
void product_tile(const uint32_t* rows, const uint32_t* columns, int64_t steps, const TileOut& out,
                  const TileOut*) {
  using Vector = typename Simd::Vector;
  constexpr int kLanes = Simd::kLanes;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = out.begins ? Vector{} : Simd::load(out.partial + (r * kVectors + v) * kLanes);
    }
  }
  for (int64_t s = 0; s < steps; ++s, rows += kRows, columns += kVectors * kLanes) {
    Vector column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      column[v] = Simd::load(reinterpret_cast<const float*>(columns) + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector row = Simd::broadcast(reinterpret_cast<const float*>(rows) + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Simd::multiply_add(row, column[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = (r * kVectors + v) * kLanes;
      if (!out.ends) {
        Simd::store(out.partial + at, sum[r][v]);
        continue;
      }
      const Vector g = sum[r][v] * out.scale;
      if (out.square_sums) {
        Simd::store(out.square_sums + at, Simd::load(out.square_sums + at) + g * g);
      }
      if (out.sums) Simd::store(out.sums + at, Simd::load(out.sums + at) + g);
    }
  }
}

}  // namespace
}  // namespace piece_ops::cpu::PIECE_OPS_ISA_NAMESPACE
