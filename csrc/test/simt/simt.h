// simt.h - the CUDA that csrc/cuda uses, on one CPU thread: for tests only.
//
// A .cu file is compiled by g++ with -DPIECE_OPS_CUDA_EMULATION; its kernels then run on fibers,
// one for every CUDA thread that ever waits (fibers.cpp). What each thing checks:
//
//   __syncthreads    a thread that ends or waits elsewhere is a deadlock, reported with who waits
//                    where
//   *_sync           lanes outside the mask, lanes that never come, shuffles from a lane outside
//   __shared__       static arrays: AddressSanitizer puts red zones round them
//   dynamic shared   exactly as long as asked for, filled with 0xCD for every block
//   races            ThreadSanitizer: every CUDA thread is a fiber of its own; barriers order,
//                    shuffles and ballots do not (as in CUDA, only __syncwarp and __syncthreads
//                    order memory)
//   order            a seed shuffles blocks, warps and lanes (set_seed)
//   async copies     until a thread waits for its group, the destination holds 0xCD: reading it too
//                    early, or starting a copy over what is still to be read, gives wrong results
//   barriers         one of them, or a wait for copies, can be skipped by file and line
//                    (skip_barrier): mutation tests
//   tickets          atomicInc, by which is_last_block (gpu.h) finds the last block: that all threads
//                    came to the barrier before it, and a fence on either side of it
//
// Blocks run one after another: what blocks tell each other while they run is not exercised, and a
// kernel that waits for another block hangs. Memory is sequentially consistent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

// ---- types --------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

// ---- the machine --------------------------------------------------------------------------------

namespace simt {

// A mistake of the kernel: deadlock, wrong mask. Thrown by run() to the launcher.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Body = void (*)(void* state);

// Runs body(state) once for every thread of the grid.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Body body, void* state);

template <class Function>
void run(dim3 grid, dim3 block, size_t shared_bytes, Function function) {
  run_grid(
      grid, block, shared_bytes, [](void* state) { (*static_cast<Function*>(state))(); },
      &function);
}

void* dynamic_shared();

// 0: blocks, warps and lanes in rising order; else shuffled by this seed.
void set_seed(uint64_t seed);
// The emulated chip: multiprocessors, and resident blocks on each.
void set_device(int multiprocessors, int blocks_per_multiprocessor);
int multiprocessors();
int blocks_per_multiprocessor();
// __syncthreads(), __syncwarp() and __pipeline_wait_prior() in this line of this file (a suffix of
// its path) do nothing.
// line 0: all barriers work. Returns nothing; skipped_count() says how often one was left out.
void skip_barrier(const char* file_suffix, int line);
int64_t skipped_count();
// Kernels launched, and memory set by cudaMemsetAsync.
int64_t launch_count();
void count_launch();
// Counts the pages of this memory that kernels touch, each once a launch; bytes 0: none. The memory
// must be whole pages of its own. touched_pages() has, since watch(), a number for every launch
// that touched any.
void watch(void* memory, size_t bytes);
const std::vector<int64_t>& touched_pages();

// A thread's asynchronous copies; intrinsics.h carries them out, where a sanitizer sees them.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;  // 0: none
};
void start_copy(const Copy& copy);
void commit_copies();
// The next copy that has not arrived, of all of this thread's groups but the last `prior`.
Copy arriving_copy(size_t prior);
// Is this the barrier, or the wait, that a test leaves out?
bool is_skipped(const char* file, int line);

enum class Barrier { kPlain, kCount, kAnd, kOr };
int sync_threads(Barrier kind, int predicate, const char* file, int line);

// This thread's work is done, as far as the block's next ticket stands for it.
void come_to_ticket();
void check_ticket();  // a ticket is drawn
void fence();

enum class WarpOp { kSync, kShuffle, kBallot, kAny, kAll, kMatch, kAdd, kMax, kMin, kOr, kAnd };
// Meets the other lanes of mask. value: what this lane gives; source: the lane kShuffle takes from.
uint64_t meet_warp(WarpOp op, unsigned mask, uint64_t value, int source, const char* what,
                   const char* file, int line);
int lane();

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  return from_word<T>(
      meet_warp(WarpOp::kShuffle, mask, to_word(value), source, "__shfl_sync", file, line));
}
template <class T>
T shuffle_index(unsigned mask, T value, int source, int width, const char* file, int line) {
  const int start = lane() & ~(width - 1);
  return shuffle(mask, value, start + (source & (width - 1)), file, line);
}
template <class T>
T shuffle_up(unsigned mask, T value, unsigned delta, int width, const char* file, int line) {
  const int start = lane() & ~(width - 1);
  const int source = lane() - static_cast<int>(delta);
  return shuffle(mask, value, source < start ? lane() : source, file, line);
}
template <class T>
T shuffle_down(unsigned mask, T value, unsigned delta, int width, const char* file, int line) {
  const int end = (lane() & ~(width - 1)) + width;
  const int source = lane() + static_cast<int>(delta);
  return shuffle(mask, value, source >= end ? lane() : source, file, line);
}
template <class T>
T shuffle_xor(unsigned mask, T value, int lane_mask, int width, const char* file, int line) {
  const int end = (lane() & ~(width - 1)) + width;
  const int source = lane() ^ lane_mask;
  return shuffle(mask, value, source >= end ? lane() : source, file, line);
}

// Default arguments for the macros below, which cannot have them.
struct Site {
  const char* file;
  int line;
  void sync_warp(unsigned mask = 0xffffffffu) const {
    meet_warp(WarpOp::kSync, mask, 0, 0, "__syncwarp", file, line);
  }
  template <class T>
  T shfl(unsigned mask, T value, int source, int width = 32) const {
    return shuffle_index(mask, value, source, width, file, line);
  }
  template <class T>
  T up(unsigned mask, T value, unsigned delta, int width = 32) const {
    return shuffle_up(mask, value, delta, width, file, line);
  }
  template <class T>
  T down(unsigned mask, T value, unsigned delta, int width = 32) const {
    return shuffle_down(mask, value, delta, width, file, line);
  }
  template <class T>
  T exchange(unsigned mask, T value, int lane_mask, int width = 32) const {
    return shuffle_xor(mask, value, lane_mask, width, file, line);
  }
  uint64_t op(WarpOp op, unsigned mask, uint64_t value, const char* what) const {
    return meet_warp(op, mask, value, 0, what, file, line);
  }
};

}  // namespace simt

#define PIECE_OPS_SIMT_SITE (::simt::Site{__FILE__, __LINE__})
#define __syncthreads() ::simt::sync_threads(::simt::Barrier::kPlain, 0, __FILE__, __LINE__)
#define __syncthreads_count(p) \
  ::simt::sync_threads(::simt::Barrier::kCount, (p) ? 1 : 0, __FILE__, __LINE__)
#define __syncthreads_and(p) \
  ::simt::sync_threads(::simt::Barrier::kAnd, (p) ? 1 : 0, __FILE__, __LINE__)
#define __syncthreads_or(p) \
  ::simt::sync_threads(::simt::Barrier::kOr, (p) ? 1 : 0, __FILE__, __LINE__)
#define __syncwarp(...) PIECE_OPS_SIMT_SITE.sync_warp(__VA_ARGS__)
#define __shfl_sync(...) PIECE_OPS_SIMT_SITE.shfl(__VA_ARGS__)
#define __shfl_up_sync(...) PIECE_OPS_SIMT_SITE.up(__VA_ARGS__)
#define __shfl_down_sync(...) PIECE_OPS_SIMT_SITE.down(__VA_ARGS__)
#define __shfl_xor_sync(...) PIECE_OPS_SIMT_SITE.exchange(__VA_ARGS__)
#define __ballot_sync(mask, p) \
  static_cast<unsigned>(       \
      PIECE_OPS_SIMT_SITE.op(::simt::WarpOp::kBallot, mask, (p) ? 1u : 0u, "__ballot_sync"))
#define __any_sync(mask, p) \
  static_cast<int>(PIECE_OPS_SIMT_SITE.op(::simt::WarpOp::kAny, mask, (p) ? 1u : 0u, "__any_sync"))
#define __all_sync(mask, p) \
  static_cast<int>(PIECE_OPS_SIMT_SITE.op(::simt::WarpOp::kAll, mask, (p) ? 1u : 0u, "__all_sync"))
#define __match_any_sync(mask, value)                                        \
  static_cast<unsigned>(PIECE_OPS_SIMT_SITE.op(::simt::WarpOp::kMatch, mask, \
                                               ::simt::to_word(value), "__match_any_sync"))
#define PIECE_OPS_SIMT_REDUCE(kind, mask, value, name) \
  static_cast<unsigned>(                               \
      PIECE_OPS_SIMT_SITE.op(::simt::WarpOp::kind, mask, static_cast<unsigned>(value), name))
#define __reduce_add_sync(mask, v) PIECE_OPS_SIMT_REDUCE(kAdd, mask, v, "__reduce_add_sync")
#define __reduce_max_sync(mask, v) PIECE_OPS_SIMT_REDUCE(kMax, mask, v, "__reduce_max_sync")
#define __reduce_min_sync(mask, v) PIECE_OPS_SIMT_REDUCE(kMin, mask, v, "__reduce_min_sync")
#define __reduce_or_sync(mask, v) PIECE_OPS_SIMT_REDUCE(kOr, mask, v, "__reduce_or_sync")
#define __reduce_and_sync(mask, v) PIECE_OPS_SIMT_REDUCE(kAnd, mask, v, "__reduce_and_sync")

#include "intrinsics.h"  // these two need what stands above
#include "runtime.h"
