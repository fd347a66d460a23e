// planted.cpp - kernels with one mistake each: what the emulation and the sanitizers must notice.
//
// planted <name> runs one of them; "none" runs the right one. Without a sanitizer it prints the
// emulation's error and ends with 3.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../cuda/gpu.h"

namespace {

using piece_ops::cuda::kAllLanes;
using piece_ops::cuda::launch;

// Sums of 64 elements by two warps, through shared memory.
__global__ void sum_kernel(const int* in, int* out, int missing_barrier) {
  __shared__ int sums[2];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int sum = in[blockIdx.x * 64 + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (lane == 0) sums[threadIdx.x / 32] = sum;
  if (!missing_barrier) __syncthreads();  // both sums are there
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1];
  if (!missing_barrier) __syncthreads();  // read before the next block of this SM writes
}

__global__ void divergent_barrier_kernel(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[0] = 1;
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x % 32 != 5) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void not_in_mask_kernel(int* out) {
  out[threadIdx.x] = static_cast<int>(__ballot_sync(0x0000ffffu, 1));
}

__global__ void shared_overrun_kernel(int* out) {
  __shared__ int cells[64];
  cells[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = cells[threadIdx.x + 1];  // thread 63 reads past the end
}

__global__ void dynamic_overrun_kernel(int* out) {
  PIECE_OPS_DYNAMIC_SHARED(int, cells);
  cells[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = cells[threadIdx.x + 1];
}

__global__ void global_overrun_kernel(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x + 100];  // 128 elements: thread 28 on reads past the end
}

__global__ void misaligned_vector_kernel(const int* in, int* out) {
  out[threadIdx.x] = static_cast<int>(__ldg(reinterpret_cast<const uint4*>(in + 1)).x);
}

__global__ void uninitialised_kernel(int* out) {
  PIECE_OPS_DYNAMIC_SHARED(int, cells);
  out[threadIdx.x] = cells[threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "none";
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  std::vector<int> in(128);
  std::vector<int> out(128, 0);
  for (int i = 0; i < 128; ++i) in[static_cast<size_t>(i)] = i;
  simt::set_seed(3);
  try {
    if (is("none") || is("race")) {
      launch(sum_kernel, 2, 64, 0, nullptr, in.data(), out.data(), is("race") ? 1 : 0);
      if (out[0] != 63 * 32 || out[1] != 63 * 32 + 64 * 64) return 4;
    }
    if (is("divergent_barrier")) launch(divergent_barrier_kernel, 1, 64, 0, nullptr, out.data());
    if (is("absent_lane")) launch(absent_lane_kernel, 1, 64, 0, nullptr, out.data());
    if (is("not_in_mask")) launch(not_in_mask_kernel, 1, 32, 0, nullptr, out.data());
    if (is("shared_overrun")) launch(shared_overrun_kernel, 1, 64, 0, nullptr, out.data());
    if (is("dynamic_overrun")) launch(dynamic_overrun_kernel, 1, 64, 256, nullptr, out.data());
    if (is("global_overrun"))
      launch(global_overrun_kernel, 1, 64, 0, nullptr, in.data(), out.data());
    if (is("misaligned_vector")) {
      launch(misaligned_vector_kernel, 1, 1, 0, nullptr, in.data(), out.data());
    }
    if (is("uninitialised")) {
      launch(uninitialised_kernel, 1, 64, 256, nullptr, out.data());
      return out[0] == static_cast<int>(0xCDCDCDCDu) ? 0 : 4;
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
  return 0;
}
