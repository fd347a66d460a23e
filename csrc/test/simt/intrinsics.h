// intrinsics.h - the part of simt.h that one thread does by itself: bits, cached loads, atomics,
// asynchronous copies.
#pragma once

#include <cstdint>

#include "simt.h"

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= ((x >> i) & 1u) << (31 - i);
  return reversed;
}
// Four bytes of x (numbers 0 .. 3) and y (4 .. 7), chosen by the selector's digits, lowest first.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long both = (static_cast<unsigned long long>(y) << 32) | x;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned number = (selector >> (4 * i)) & 7u;
    chosen |= static_cast<unsigned>((both >> (8 * number)) & 0xffu) << (8 * i);
  }
  return chosen;
}
inline unsigned __float_as_uint(float x) { return simt::from_word<unsigned>(simt::to_word(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_word<float>(simt::to_word(x)); }
inline int __float_as_int(float x) { return simt::from_word<int>(simt::to_word(x)); }
inline float __int_as_float(int x) { return simt::from_word<float>(simt::to_word(x)); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return *p;
}
template <class T>
T __ldlu(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

// Asynchronous copies into shared memory, of 4, 8 or 16 bytes. By word, not memcpy: plain accesses,
// which ThreadSanitizer takes for this thread's.
namespace simt {
struct __attribute__((may_alias)) CopyWord {
  uint32_t bits;
};
inline void fill_or_copy(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes / sizeof(CopyWord); ++i) {
    static_cast<CopyWord*>(to)[i] =
        from ? static_cast<const CopyWord*>(from)[i] : CopyWord{0xCDCDCDCDu};
  }
}
inline void wait_for_copies(size_t prior, const char* file, int line) {
  if (is_skipped(file, line)) return;
  for (Copy copy = arriving_copy(prior); copy.bytes != 0; copy = arriving_copy(prior)) {
    fill_or_copy(copy.to, copy.from, copy.bytes);
  }
}
}  // namespace simt

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  simt::start_copy({to, from, bytes});
  simt::fill_or_copy(to, nullptr, bytes);
}
inline void __pipeline_commit() { simt::commit_copies(); }
#define __pipeline_wait_prior(prior) \
  ::simt::wait_for_copies(static_cast<size_t>(prior), __FILE__, __LINE__)

inline void __threadfence() {
  asm volatile("" ::: "memory");
  simt::fence();
}
inline void __threadfence_block() { asm volatile("" ::: "memory"); }

// Atomics, relaxed as in CUDA; the same overloads, so that what nvcc would refuse is refused here.
namespace simt {
template <class T, class Change>
T update(T* p, Change change) {
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  for (;;) {
    T next = change(old);
    if (__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return old;
    }
  }
}
}  // namespace simt

#define PIECE_OPS_SIMT_INTEGER_ATOMICS(T)                                                    \
  inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }       \
  inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }         \
  inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }       \
  inline T atomicXor(T* p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); }       \
  inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }     \
  inline T atomicMax(T* p, T v) {                                                            \
    return simt::update(p, [v](T old) { return old < v ? v : old; });                        \
  }                                                                                          \
  inline T atomicMin(T* p, T v) {                                                            \
    return simt::update(p, [v](T old) { return v < old ? v : old; });                        \
  }                                                                                          \
  inline T atomicCAS(T* p, T expected, T v) {                                                \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
    return expected;                                                                         \
  }
PIECE_OPS_SIMT_INTEGER_ATOMICS(int)
PIECE_OPS_SIMT_INTEGER_ATOMICS(unsigned)
PIECE_OPS_SIMT_INTEGER_ATOMICS(unsigned long long)
#undef PIECE_OPS_SIMT_INTEGER_ATOMICS
// Only tickets are drawn by it.
inline unsigned atomicInc(unsigned* p, unsigned last) {
  simt::check_ticket();
  return simt::update(p, [last](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline float atomicAdd(float* p, float v) {
  return simt::update(p, [v](float old) { return old + v; });
}
inline double atomicAdd(double* p, double v) {
  return simt::update(p, [v](double old) { return old + v; });
}
