// isa.cpp - the choice of the instruction set. See isa.h.
#include "isa.h"

#include <cstdlib>

#include "bodies/bodies.h"
#include "piece_ops/core/check.h"

namespace piece_ops::cpu {

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{{"portable", &portable::kBodies}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                        __builtin_cpu_supports("popcnt");
  if (has_avx2) isas.push_back({"avx2", &avx2::kBodies});
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) isas.push_back({"avx512", &avx512::kBodies});
#endif
  return isas;
}

namespace {

Isa choose_isa() {
  const std::vector<Isa> isas = supported_isas();
  const char* wanted = std::getenv("PIECE_OPS_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string names;
  for (const Isa& isa : isas) {
    if (isa.name == std::string(wanted)) return isa;
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  fail(ErrorKind::kArgument, "piece_ops: PIECE_OPS_ISA must be one of ", names,
       " (what this build holds and this CPU can run), got '", wanted, "'");
}

}  // namespace

const Isa& active_isa() {
  static const Isa isa = choose_isa();  // a throw leaves it unset: the next call tries again
  return isa;
}

const Products* bfloat16_products() {
#if defined(__x86_64__)
  if (active_isa().bodies == &avx512::kBodies && __builtin_cpu_supports("avx512bf16")) {
    return &avx512bf16::kProducts;
  }
#endif
  return nullptr;
}

}  // namespace piece_ops::cpu
