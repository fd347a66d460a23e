// avx2.cpp - the inner loops for AVX2 (with F16C, BMI): Haswell, Zen and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "bodies.h"

namespace piece_ops::cpu::avx2 {
namespace {

template <int kPredicate>
inline uint64_t compare_mask(const float* x, float bound) {
  const __m256 b = _mm256_set1_ps(bound);
  uint64_t mask = 0;
  for (int j = 0; j < 8; ++j) {
    const __m256 hit = _mm256_cmp_ps(_mm256_loadu_ps(x + 8 * j), b, kPredicate);
    mask |= static_cast<uint64_t>(static_cast<unsigned>(_mm256_movemask_ps(hit))) << (8 * j);
  }
  return mask;
}

template <int kPredicate>
inline uint64_t compare_mask(const double* x, double bound) {
  const __m256d b = _mm256_set1_pd(bound);
  uint64_t mask = 0;
  for (int j = 0; j < 16; ++j) {
    const __m256d hit = _mm256_cmp_pd(_mm256_loadu_pd(x + 4 * j), b, kPredicate);
    mask |= static_cast<uint64_t>(static_cast<unsigned>(_mm256_movemask_pd(hit))) << (4 * j);
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
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) out[i] = fp16_to_float(x[i]);
}

// 12 sums of 16 registers; 8 loads for 12 multiply-adds.
constexpr int kProductRows = 6, kProductVectors = 2;

struct FloatLanes {
  using Vector = __m256;
  static constexpr int kLanes = 8;
  static Vector load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* x, Vector v) { _mm256_storeu_ps(x, v); }
  static Vector broadcast(const float* x) { return _mm256_set1_ps(*x); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
};

}  // namespace
}  // namespace piece_ops::cpu::avx2

#define PIECE_OPS_ISA_NAMESPACE avx2
#include "bodies.inl"
#endif
