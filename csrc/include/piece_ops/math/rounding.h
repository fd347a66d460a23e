// rounding.h - bfloat16 and float16 to and from float32; narrowing rounds to nearest, ties to even,
// or at random.
//
// Bit arithmetic only, so the result does not depend on the rounding mode, on flush-to-zero or on
// the instruction set. NaN stays NaN (quiet).
#pragma once

#include <cstdint>

#include "piece_ops/math/hd.h"
#include "piece_ops/math/ordered_bits.h"

namespace piece_ops {

PIECE_OPS_HD float bf16_to_float(uint16_t h) {
  return bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

PIECE_OPS_HD uint16_t float_to_bf16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// A hash of 32 bits (lowbias32).
PIECE_OPS_HD uint32_t hash_32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Up with the probability of x's share of the distance from the lower to the upper neighbour, if
// the lower 16 bits of `random` are: of a negative number the bits grow with its size, so that both
// signs are rounded alike. Infinities, and what bfloat16 holds, stay.
PIECE_OPS_HD uint16_t float_to_bf16_at_random(float x, uint32_t random) {
  return static_cast<uint16_t>((bit_cast<uint32_t>(x) + (random & 0xffffu)) >> 16);
}

PIECE_OPS_HD float fp16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t fraction = h & 0x3ffu;
  if (exponent == 0x1f) return bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  // Zero or subnormal: fraction * 2^-24, exact in float32 (an integer below 2^10 times a power).
  const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
}

PIECE_OPS_HD uint16_t float_to_fp16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  // From 65520 = (2 - 2^-11) * 2^15 upwards the nearest float16 is infinity.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude >= 0x38800000u) {  // 2^-14: normal
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  // Subnormal: the unit is 2^-24; shift the full fraction right and round on what falls off.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 102) return static_cast<uint16_t>(sign);  // below 2^-25: rounds to zero
  const uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126 - exponent;  // 14 .. 24
  const uint32_t kept = fraction >> shift;
  const uint32_t rest = fraction & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  const uint32_t up = (rest > half || (rest == half && (kept & 1u))) ? 1u : 0u;
  return static_cast<uint16_t>(sign | (kept + up));
}

}  // namespace piece_ops
