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
// sampled_weight_grad: kWide floats in a register.
constexpr int kWide = 8;
using Wide = __m256;

inline Wide load_wide(const float* x) { return _mm256_loadu_ps(x); }
inline Wide load_wide(const Bf16* x) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Wide load_wide(const Fp16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Wide gather_wide(const float* x, const int32_t* positions) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions));
  return _mm256_i32gather_ps(x, at, 4);
}
// Pairs of 16-bit elements, the wanted one in the upper half.
inline __m256i gather_pairs(const void* x, const int32_t* positions) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions));
  const __m256i pairs =
      _mm256_i32gather_epi32(static_cast<const int*>(x), _mm256_srli_epi32(at, 1), 4);
  const __m256i is_lower = _mm256_andnot_si256(at, _mm256_set1_epi32(1));
  return _mm256_sllv_epi32(pairs, _mm256_slli_epi32(is_lower, 4));
}
inline Wide gather_wide(const Bf16* x, const int32_t* positions) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(gather_pairs(x, positions), upper));
}
inline Wide gather_wide(const Fp16* x, const int32_t* positions) {
  const __m256i lower = _mm256_srli_epi32(gather_pairs(x, positions), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
  return _mm256_cvtph_ps(packed);
}
inline void store_wide(float* x, Wide v) { _mm256_storeu_ps(x, v); }

// v[i][j] becomes v[j][i]: pairs, quadruples, then the 128-bit halves.
inline void transpose(Wide* v) {
  Wide pairs[kWide];
  for (int i = 0; i < kWide; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  Wide fours[kWide];  // fours[i + c], half q: column 4 q + c of rows i .. i + 3
  for (int i = 0; i < kWide; i += 4) {
    for (int c = 0; c < 2; ++c) {
      const __m256d low = _mm256_castps_pd(pairs[i + c]);
      const __m256d high = _mm256_castps_pd(pairs[i + 2 + c]);
      fours[i + 2 * c] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      fours[i + 2 * c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    v[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
}

}  // namespace
}  // namespace piece_ops::cpu::avx2

#define PIECE_OPS_ISA_NAMESPACE avx2
#include "bodies.inl"
#endif
