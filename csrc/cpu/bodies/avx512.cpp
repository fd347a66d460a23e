// avx512.cpp - the inner loops for AVX-512 F, BW, DQ, VL: Skylake-X, Zen 4 and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "bodies.h"

namespace piece_ops::cpu::avx512 {
namespace {

template <int kPredicate>
inline uint64_t compare_mask(const float* x, float bound) {
  const __m512 b = _mm512_set1_ps(bound);
  uint64_t mask = 0;
  for (int j = 0; j < 4; ++j) {
    const __mmask16 hit = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16 * j), b, kPredicate);
    mask |= static_cast<uint64_t>(hit) << (16 * j);
  }
  return mask;
}

template <int kPredicate>
inline uint64_t compare_mask(const double* x, double bound) {
  const __m512d b = _mm512_set1_pd(bound);
  uint64_t mask = 0;
  for (int j = 0; j < 8; ++j) {
    const __mmask8 hit = _mm512_cmp_pd_mask(_mm512_loadu_pd(x + 8 * j), b, kPredicate);
    mask |= static_cast<uint64_t>(hit) << (8 * j);
  }
  return mask;
}

// Bit j: x[j] is not less than bound (greater, equal or NaN), j < 64.
template <class T>
inline uint64_t not_less_mask(const T* x, T bound) {
  return compare_mask<_CMP_NLT_UQ>(x, bound);
}

template <class T>
inline uint64_t equal_mask(const T* x, T bound) {
  return compare_mask<_CMP_EQ_OQ>(x, bound);
}

inline void widen_fp16(const uint16_t* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(half));
  }
  for (; i < n; ++i) out[i] = fp16_to_float(x[i]);
}

// 24 sums of 32 registers; 11 loads for 24 multiply-adds.
constexpr int kProductRows = 8, kProductVectors = 3;

struct FloatLanes {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
  static Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
};

}  // namespace
}  // namespace piece_ops::cpu::avx512

#define PIECE_OPS_ISA_NAMESPACE avx512
#include "bodies.inl"
#endif
