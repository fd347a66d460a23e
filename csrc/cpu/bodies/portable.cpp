// portable.cpp - the inner loops in plain C++: what every CPU of the platform can run.
#include "bodies.h"

namespace piece_ops::cpu::portable {
namespace {

// Bit j: x[j] is not less than bound (greater, equal or NaN), j < 64. Nearly always none is, and
// that question vectorises; the mask itself is built only when the answer is yes.
template <class T>
inline uint64_t not_less_mask(const T* x, T bound) {
  unsigned any = 0;
  for (int j = 0; j < 64; ++j) any |= static_cast<unsigned>(!(x[j] < bound));
  if (!any) return 0;
  uint64_t mask = 0;
  for (int j = 0; j < 64; ++j) mask |= static_cast<uint64_t>(!(x[j] < bound)) << j;
  return mask;
}

template <class T>
inline uint64_t equal_mask(const T* x, T bound) {
  uint64_t mask = 0;
  for (int j = 0; j < 64; ++j) mask |= static_cast<uint64_t>(x[j] == bound) << j;
  return mask;
}

inline void widen_fp16(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = fp16_to_float(x[i]);
}

// 8 sums of SSE2's 16 registers. Product and sum are rounded each: no fused operation everywhere.
constexpr int kProductRows = 4, kProductVectors = 2;

struct FloatLanes {
  typedef float Vector __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static Vector load(const float* x) {
    Vector v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }
  static void store(float* x, Vector v) { __builtin_memcpy(x, &v, sizeof v); }
  static Vector broadcast(const float* x) { return Vector{*x, *x, *x, *x}; }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return a * b + sum; }
};
// sampled_weight_grad: kWide floats; the compiler finds registers for them.
constexpr int kWide = 4;
typedef float Wide __attribute__((vector_size(4 * kWide)));

inline Wide load_wide(const float* x) { return Wide{x[0], x[1], x[2], x[3]}; }
template <class Half>
inline Wide load_wide(const Half* x) {
  return Wide{widen(x[0]), widen(x[1]), widen(x[2]), widen(x[3])};
}
template <class Element>
inline Wide gather_wide(const Element* x, const int32_t* positions) {
  return Wide{widen(x[positions[0]]), widen(x[positions[1]]), widen(x[positions[2]]),
              widen(x[positions[3]])};
}
inline void store_wide(float* x, Wide v) {
  for (int i = 0; i < kWide; ++i) x[i] = v[i];
}

// v[i][j] becomes v[j][i].
inline void transpose(Wide* v) {
  const Wide a = v[0], b = v[1], c = v[2], d = v[3];
  for (int i = 0; i < kWide; ++i) v[i] = Wide{a[i], b[i], c[i], d[i]};
}

}  // namespace
}  // namespace piece_ops::cpu::portable

#define PIECE_OPS_ISA_NAMESPACE portable
#include "bodies.inl"
