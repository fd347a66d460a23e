// avx512bf16.cpp - products of bfloat16 pairs, summed in float32: Cooper Lake, Zen 4 and later.
//
// Two multiply-adds a lane and instruction. Products are exact; a pair is added in the fixed order
// of the instruction (VDPBF16PS: the odd token first), subnormal numbers and results count as 0.
#if defined(__x86_64__)
#include <immintrin.h>

#include "bodies.h"

namespace piece_ops::cpu::avx512bf16 {
namespace {

struct Pairs {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
  static Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

// Two tokens a word, the first in its lower half; the last token of an odd number beside a zero.
template <int kPanel>
void pack_pairs(DType, const void* x, int64_t stride, int64_t tokens, int64_t width, uint32_t* out,
                int64_t panel_words) {
  const uint16_t* first = static_cast<const uint16_t*>(x);
  for (int64_t t = 0; t < tokens; t += 2, first += 2 * stride, out += kPanel) {
    const bool has_second = t + 1 < tokens;
    const uint16_t* second = has_second ? first + stride : first;
    const uint32_t keep = has_second ? 0xffff0000u : 0;
    uint32_t* to = out;
    int64_t i = 0;
    for (; i + kPanel <= width; i += kPanel, to += panel_words) {
      for (int j = 0; j < kPanel; ++j) {
        to[j] = first[i + j] | ((static_cast<uint32_t>(second[i + j]) << 16) & keep);
      }
    }
    for (int j = 0; i < width && j < kPanel; ++j) {
      to[j] =
          i + j < width ? first[i + j] | ((static_cast<uint32_t>(second[i + j]) << 16) & keep) : 0;
    }
  }
}

}  // namespace
}  // namespace piece_ops::cpu::avx512bf16

#define PIECE_OPS_ISA_NAMESPACE avx512bf16
#include "product_tile.inl"

namespace piece_ops::cpu::avx512bf16 {
const Products kProducts = {
    8,       48,      2,      1, pack_pairs<8>, pack_pairs<48>, product_tile<Pairs, 8, 3>,
    nullptr, nullptr, nullptr};
}  // namespace piece_ops::cpu::avx512bf16
#endif
