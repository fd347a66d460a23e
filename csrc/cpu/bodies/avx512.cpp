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
// sampled_weight_grad: kWide floats in a register.
constexpr int kWide = 16;
using Wide = __m512;

inline Wide load_wide(const float* x) { return _mm512_loadu_ps(x); }
inline Wide load_wide(const Bf16* x) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Wide load_wide(const Fp16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Wide gather_wide(const float* x, const int32_t* positions) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(positions), x, 4);
}
// Pairs of 16-bit elements, the wanted one in the upper half.
inline __m512i gather_pairs(const void* x, const int32_t* positions) {
  const __m512i at = _mm512_loadu_si512(positions);
  const __m512i pairs = _mm512_i32gather_epi32(_mm512_srli_epi32(at, 1), x, 4);
  const __m512i is_lower = _mm512_andnot_si512(at, _mm512_set1_epi32(1));
  return _mm512_sllv_epi32(pairs, _mm512_slli_epi32(is_lower, 4));
}
inline Wide gather_wide(const Bf16* x, const int32_t* positions) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(gather_pairs(x, positions), upper));
}
inline Wide gather_wide(const Fp16* x, const int32_t* positions) {
  const __m512i lower = _mm512_srli_epi32(gather_pairs(x, positions), 16);
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(lower));
}
inline void store_wide(float* x, Wide v) { _mm512_storeu_ps(x, v); }

// v[i][j] becomes v[j][i]: pairs, quadruples, then the 128-bit quarters.
inline void transpose(Wide* v) {
  Wide pairs[kWide];
  for (int i = 0; i < kWide; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  __m512d fours[kWide];  // fours[i + c], quarter q: column 4 q + c of rows i .. i + 3
  for (int i = 0; i < kWide; i += 4) {
    for (int c = 0; c < 2; ++c) {
      const __m512d low = _mm512_castps_pd(pairs[i + c]);
      const __m512d high = _mm512_castps_pd(pairs[i + 2 + c]);
      fours[i + 2 * c] = _mm512_unpacklo_pd(low, high);
      fours[i + 2 * c + 1] = _mm512_unpackhi_pd(low, high);
    }
  }
  for (int c = 0; c < 4; ++c) {
    const __m512d even_low = _mm512_shuffle_f64x2(fours[c], fours[4 + c], 0x88);
    const __m512d odd_low = _mm512_shuffle_f64x2(fours[c], fours[4 + c], 0xdd);
    const __m512d even_high = _mm512_shuffle_f64x2(fours[8 + c], fours[12 + c], 0x88);
    const __m512d odd_high = _mm512_shuffle_f64x2(fours[8 + c], fours[12 + c], 0xdd);
    v[c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(even_low, even_high, 0x88));
    v[4 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd_low, odd_high, 0x88));
    v[8 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(even_low, even_high, 0xdd));
    v[12 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd_low, odd_high, 0xdd));
  }
}

}  // namespace
}  // namespace piece_ops::cpu::avx512

#define PIECE_OPS_ISA_NAMESPACE avx512
#include "bodies.inl"
#endif
