// peers_cub_topk.cu - CUB's DeviceTopK as a peer of select_topk: compiled by the benchmark with
// nvcc.
//
// cub_topk_bytes says how much scratch n float32 scores need; cub_topk writes k pairs (score,
// position) in any order, any of the ties. Not there before CCCL 3.2: then both return -1.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if __has_include(<cub/device/device_topk.cuh>)
#include <cub/device/device_topk.cuh>
#include <cuda/iterator>
#include <cuda/std/execution>
#define HAS_TOPK 1
#endif

namespace {

int64_t run(void* scratch, size_t bytes, const float* scores, float* top, int64_t* positions,
            int64_t n, int64_t k, cudaStream_t stream) {
#if defined(HAS_TOPK)
  namespace execution = cuda::execution;
  const auto requirements = execution::require(execution::determinism::not_guaranteed,
                                               execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  const cudaError_t error =
      cub::DeviceTopK::MaxPairs(scratch, bytes, scores, top, cuda::counting_iterator<int64_t>{0},
                                positions, n, k, environment);
  return error == cudaSuccess ? static_cast<int64_t>(bytes) : -1 - static_cast<int64_t>(error);
#else
  (void)scratch, (void)bytes, (void)scores, (void)top, (void)positions, (void)n, (void)k;
  (void)stream;
  return -1;
#endif
}

}  // namespace

extern "C" int64_t cub_topk_bytes(int64_t n, int64_t k) {
  return run(nullptr, 0, nullptr, nullptr, nullptr, n, k, nullptr);
}

extern "C" int64_t cub_topk(void* scratch, int64_t bytes, const float* scores, float* top,
                            int64_t* positions, int64_t n, int64_t k, void* stream) {
  return run(scratch, static_cast<size_t>(bytes), scores, top, positions, n, k,
             static_cast<cudaStream_t>(stream));
}
