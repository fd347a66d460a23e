// element.h - elements on the device: one, four or eight at a time, in accesses of up to 16 bytes.
#pragma once

#include "gpu.h"
#include "piece_ops/core/dtype.h"
#include "piece_ops/math/rounding.h"

namespace piece_ops::cuda {

constexpr int kVector = 8;  // elements: 16 bytes of bfloat16, 32 of float32
constexpr int kQuad = 4;    // elements: 16 bytes of float32

// Element i in float32; float64 is not taken.
__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return fp16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

// Element i, rounded to nearest even into the dtype; float64 widens.
__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[i] = x;
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[i] = float_to_bf16(x);
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[i] = float_to_fp16(x);
      break;
    case DType::kFloat64:
      static_cast<double*>(data)[i] = static_cast<double>(x);
      break;
  }
}

// The types an element is read as; eight of them start at a 16-byte boundary.
struct Float32 {
  using Bits = uint32_t;
  static constexpr uint32_t kFullExponent = 0x7f800000u;
  __device__ static __forceinline__ float widen(uint32_t bits) { return bit_cast<float>(bits); }
};
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t kFullExponent = 0x7f80u;
  __device__ static __forceinline__ float widen(uint16_t bits) { return bf16_to_float(bits); }
};
struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t kFullExponent = 0x7c00u;
  // The device's own conversion is exact, too, and one instruction instead of a dozen and a branch.
  __device__ static __forceinline__ float widen(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    return fp16_to_float(bits);
#endif
  }
};

// Calls body with the Float32, BFloat16 or Float16 that a code names.
template <class Body>
__device__ __forceinline__ void with_element(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      body(Float32{});
      break;
    case DType::kBFloat16:
      body(BFloat16{});
      break;
    default:
      body(Float16{});
      break;
  }
}

// Eight elements from a 16-byte boundary, streamed: they will not be read again.
__device__ __forceinline__ void load_vector(const uint16_t* p, uint16_t (&bits)[kVector]) {
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(p));
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits[2 * i] = static_cast<uint16_t>(word[i]);
    bits[2 * i + 1] = static_cast<uint16_t>(word[i] >> 16);
  }
}
__device__ __forceinline__ void load_vector(const uint32_t* p, uint32_t (&bits)[kVector]) {
  const uint4 low = __ldcs(reinterpret_cast<const uint4*>(p));
  const uint4 high = __ldcs(reinterpret_cast<const uint4*>(p) + 1);
  bits[0] = low.x, bits[1] = low.y, bits[2] = low.z, bits[3] = low.w;
  bits[4] = high.x, bits[5] = high.y, bits[6] = high.z, bits[7] = high.w;
}

// Four elements from a boundary of their size, streamed; four float32, and back. Where lane l of
// a warp has elements 4 l .. 4 l + 3, every access of the warp is one run of whole 32-byte sectors.
// __stcs is one instruction; a plain store of a float4 nvcc may cut into four of 4 bytes.
__device__ __forceinline__ void load_quad(const uint16_t* p, uint16_t (&bits)[kQuad]) {
  const uint2 words = __ldcs(reinterpret_cast<const uint2*>(p));
  bits[0] = static_cast<uint16_t>(words.x), bits[1] = static_cast<uint16_t>(words.x >> 16);
  bits[2] = static_cast<uint16_t>(words.y), bits[3] = static_cast<uint16_t>(words.y >> 16);
}
__device__ __forceinline__ void load_quad(const uint32_t* p, uint32_t (&bits)[kQuad]) {
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(p));
  bits[0] = words.x, bits[1] = words.y, bits[2] = words.z, bits[3] = words.w;
}
__device__ __forceinline__ void load_floats(const float* p, float (&x)[kQuad]) {
  const float4 words = __ldcs(reinterpret_cast<const float4*>(p));
  x[0] = words.x, x[1] = words.y, x[2] = words.z, x[3] = words.w;
}
__device__ __forceinline__ void store_floats(float* p, const float (&x)[kQuad]) {
  __stcs(reinterpret_cast<float4*>(p), make_float4(x[0], x[1], x[2], x[3]));
}

}  // namespace piece_ops::cuda
