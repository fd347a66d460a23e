// gpu.h - the one header every .cu file includes: CUDA, or its emulation on the CPU for tests.
//
// launch() is a function template instead of <<<>>>, so that nvcc, g++ and clang-tidy all read the
// same source. Arguments are converted to the kernel's parameter types without narrowing.
#pragma once

#if defined(PIECE_OPS_CUDA_EMULATION)
#include "simt/simt.h"
#else
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <utility>

#include "piece_ops/core/check.h"

// T* name = this block's dynamic shared memory, 16-byte aligned.
#if defined(PIECE_OPS_CUDA_EMULATION)
#define PIECE_OPS_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())
#else
#define PIECE_OPS_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char piece_ops_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(piece_ops_dynamic_shared)
#endif

// Throws piece_ops::Error with the call, the error's name and its text.
#define PIECE_OPS_CUDA_CHECK(...)                                                      \
  do {                                                                                 \
    const cudaError_t piece_ops_error = (__VA_ARGS__);                                 \
    if (piece_ops_error != cudaSuccess)                                                \
      ::piece_ops::cuda::fail_cuda(piece_ops_error, #__VA_ARGS__, __FILE__, __LINE__); \
  } while (0)

namespace piece_ops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The last t of 0 .. count - 1 with start(t) <= position, for starts that do not decrease, the first
// of which is not above it. Of tensors that start at one place it is the last, which is not empty.
template <class Start>
__device__ __forceinline__ int64_t last_start(int64_t count, int64_t position, Start start) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (start(middle) <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sum over this lane and the lanes below it.
template <class T>
__device__ __forceinline__ T warp_scan(T own, int lane) {
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const T lower = __shfl_up_sync(kAllLanes, own, delta);
    if (lane >= delta) own += lower;
  }
  return own;
}

// True in the block that is the last of the grid to come here, which then may read what all others
// wrote before they came. All threads of all blocks call it, once a launch; it is a barrier. *ticket
// is zero before, and again after the launch.
//
// Nobody waits: a block draws a number and goes on to its end; the one that draws the highest knows
// that all others have drawn theirs. Why it sees what they wrote (PTX memory model): the barrier
// puts the writes of a block's threads before its thread 0's first fence, which with the atomic
// after it is a release, for all that came before it. The atomic of the last block read a number
// that goes back, atomic after atomic, to every other block's; with the fence after it that is an
// acquire, and the second barrier hands it to the block's other threads. So plain loads are enough
// (the fence also drops what this multiprocessor's L1 has), but not through the read-only path.
// What another block reads before it draws cannot be what the last one writes after.
//
// The emulation runs one block after another and cannot show a lost write. It checks the form: who
// draws has fenced since a barrier to which all threads had come, and fences again before the next.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __shared__ bool is_last;
#if defined(PIECE_OPS_CUDA_EMULATION)
  simt::come_to_ticket();
#endif
  __syncthreads();  // what this block's threads wrote comes before the fence
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // from the highest to 0 again
    __threadfence();
  }
  __syncthreads();  // the number is drawn
  return is_last;
}

[[noreturn]] inline void fail_cuda(cudaError_t error, const char* what, const char* file,
                                   int line) {
  // Not left behind for the next call that asks (a sticky error stays all the same).
  (void)cudaGetLastError();
  fail(ErrorKind::kCuda, "piece_ops: CUDA call ", what, " failed: ", cudaGetErrorName(error), " (",
       static_cast<int>(error), "): ", cudaGetErrorString(error), ", at ", file, ":", line);
}

// From's value as a To; a narrowing conversion does not compile.
template <class To, class From>
To convert(From&& from) {
  return To{std::forward<From>(from)};
}

// Runs kernel(args...) on the stream. block: threads of a block.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t dynamic_shared_bytes,
            cudaStream_t stream, Args&&... args) {
  static_assert(sizeof...(Parameters) == sizeof...(Args), "as many arguments as the kernel takes");
  PIECE_OPS_CHECK(grid > 0 && grid <= 0x7fffffff,
                  "piece_ops: a grid must have 1..2^31-1 blocks, got ", grid);
  const dim3 grid_blocks(static_cast<unsigned>(grid));
  const dim3 block_threads(static_cast<unsigned>(block));
#if defined(PIECE_OPS_CUDA_EMULATION)
  (void)stream;
  // Copied once, as a launch copies its parameters.
  simt::run(grid_blocks, block_threads, dynamic_shared_bytes,
            [&] { kernel(convert<Parameters>(args)...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid_blocks;
  config.blockDim = block_threads;
  config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = stream;
  PIECE_OPS_CUDA_CHECK(
      cudaLaunchKernelEx(&config, kernel, convert<Parameters>(std::forward<Args>(args))...));
#endif
}

}  // namespace piece_ops::cuda
