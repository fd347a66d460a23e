// add_rounded.h - float32 sums into a bfloat16 accumulator, rounded up or down at random.
#pragma once

#include <cstdint>

#include "piece_ops/core/context.h"

namespace piece_ops {

struct AddRoundedArgs {
  int64_t n;
  uint16_t* target;    // bfloat16
  const float* value;  // target[i] = target[i] + value[i], see math/rounding.h
  uint32_t key;        // random bits are a hash of it and the position
  int64_t begin;       // position of target[0]: these may be a part of an accumulator
};

namespace cpu {
// Whether a sum is not finite afterwards.
bool add_rounded(const Context& context, const AddRoundedArgs& args);
}  // namespace cpu

}  // namespace piece_ops
