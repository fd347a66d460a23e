// bodies.h - the tables of inner loops, one per instruction set. Filled by <isa>.cpp.
#pragma once

#include "../isa.h"
#include "../products.h"
#include "piece_ops/math/ordered_bits.h"
#include "piece_ops/math/rounding.h"

namespace piece_ops::cpu {

// Elements that know their type, where templates are to be chosen by it.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
PIECE_OPS_HD float widen(float x) { return x; }
PIECE_OPS_HD float widen(Bf16 x) { return bf16_to_float(x.bits); }
PIECE_OPS_HD float widen(Fp16 x) { return fp16_to_float(x.bits); }

namespace portable {
extern const Bodies kBodies;
}
namespace avx2 {
extern const Bodies kBodies;
}
namespace avx512 {
extern const Bodies kBodies;
}
namespace avx512bf16 {
extern const Products kProducts;
}
namespace amxbf16 {
extern const Products kProducts;
}
}  // namespace piece_ops::cpu
