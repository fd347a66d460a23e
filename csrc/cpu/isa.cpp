// isa.cpp - the choice of the instruction set. See isa.h.
#include "isa.h"

#include <cstdlib>

#include "bodies/bodies.h"
#include "piece_ops/core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace piece_ops::cpu {

namespace {

// Does the CPU multiply tiles of bfloat16, and does the system lend this process the registers?
// (8 KiB of state a thread, which Linux gives on request only.)
[[maybe_unused]] bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;     // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{{"portable", &portable::kBodies, nullptr}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                        __builtin_cpu_supports("popcnt");
  if (has_avx2) isas.push_back({"avx2", &avx2::kBodies, nullptr});
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_pairs = has_avx512 && __builtin_cpu_supports("avx512bf16");
  const Products* pairs = has_pairs ? &avx512bf16::kProducts : nullptr;
  if (has_avx512) isas.push_back({"avx512", &avx512::kBodies, pairs});
  if (has_avx512 && may_use_amx()) {
    isas.push_back({"amx", &avx512::kBodies, &amxbf16::kProducts});
  }
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

}  // namespace piece_ops::cpu
