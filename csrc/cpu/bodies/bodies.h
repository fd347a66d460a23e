// bodies.h - the tables of inner loops, one per instruction set. Filled by <isa>.cpp.
#pragma once

#include "../isa.h"
#include "../products.h"
#include "piece_ops/math/ordered_bits.h"
#include "piece_ops/math/rounding.h"

namespace piece_ops::cpu {
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
}  // namespace piece_ops::cpu
