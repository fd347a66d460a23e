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

// The sum of all elements, by the last block; what is_last_block does, with one part left out.
enum class Ticket { kRight, kNoBarrier, kNoRelease, kNoAcquire };
__global__ void last_block_kernel(const int* in, int* sums, unsigned* ticket, Ticket how) {
  __shared__ bool drawn;
  bool is_last = false;
  if (threadIdx.x % 32 == 0) atomicAdd(sums + blockIdx.x, in[blockIdx.x * 64 + threadIdx.x]);
  if (how == Ticket::kRight) {
    is_last = piece_ops::cuda::is_last_block(ticket);
  } else {
    simt::come_to_ticket();
    if (how != Ticket::kNoBarrier) __syncthreads();
    if (threadIdx.x == 0) {
      if (how != Ticket::kNoRelease) __threadfence();
      drawn = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
      if (how != Ticket::kNoAcquire) __threadfence();
    }
    __syncthreads();
    is_last = drawn;
  }
  if (is_last && threadIdx.x == 0) sums[0] += sums[1];
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

// Sums of each lane's own elements, in on the way through a ring of two stages. `mistake` names what
// is wrong with it.
enum class RingMistake { kNone, kNoWait, kOneTooFew, kTooEarly, kNotCommitted, kForeignBytes };

__global__ void ring_kernel(const int* in, int* out, int steps, RingMistake mistake) {
  __shared__ uint4 ring[2][64];
  const int t = static_cast<int>(threadIdx.x);
  const auto start = [&](int step) {
    if (step < steps) __pipeline_memcpy_async(&ring[step % 2][t], in + (step * 64 + t) * 4, 16);
    if (mistake != RingMistake::kNotCommitted) __pipeline_commit();
  };
  start(0);
  start(1);
  // A warp operation orders no memory, but all lanes have begun, as ThreadSanitizer needs.
  if (!__any_sync(kAllLanes, steps > 0)) return;
  int sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (mistake == RingMistake::kOneTooFew) {
      __pipeline_wait_prior(2);
    } else if (mistake != RingMistake::kNoWait) {
      __pipeline_wait_prior(1);
    }
    if (mistake == RingMistake::kTooEarly) start(step + 2);
    const uint4 own = ring[step % 2][mistake == RingMistake::kForeignBytes ? t ^ 1 : t];
    if (mistake != RingMistake::kTooEarly) start(step + 2);
    sum += static_cast<int>(own.x + own.y + own.z + own.w);
  }
  out[t] = sum;
}

int run_ring(RingMistake mistake) {
  constexpr int kSteps = 5;
  std::vector<int> in(kSteps * 256);
  std::vector<int> out(64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i % 1009);
  launch(ring_kernel, 1, 64, 0, nullptr, in.data(), out.data(), int{kSteps}, mistake);
  for (size_t t = 0; t < 64; ++t) {
    int sum = 0;
    for (size_t i = 0; i < in.size(); ++i) sum += i / 4 % 64 == t ? in[i] : 0;
    if (sum != out[t]) throw simt::Error("the ring's sums are wrong");
  }
  return 0;
}

// What has arrived after which wait, for each size of copy; and more copies than are kept at once.
__global__ void copies_kernel(const int* in, int* out) {
  PIECE_OPS_DYNAMIC_SHARED(int, cells);
  __pipeline_memcpy_async(cells, in, 4);
  __pipeline_memcpy_async(cells + 2, in + 2, 8);
  __pipeline_commit();
  __pipeline_memcpy_async(cells + 4, in + 4, 16);
  __pipeline_commit();
  __pipeline_memcpy_async(cells + 8, in + 8, 16);
  const auto show = [&](int row) {
    for (int i = 0; i < 12; ++i) out[12 * row + i] = cells[i];
  };
  show(0);  // nothing
  __pipeline_wait_prior(1);
  show(1);  // the first group
  __pipeline_wait_prior(0);
  show(2);  // the second; the third is not committed
  __pipeline_commit();
  __pipeline_wait_prior(0);
  show(3);  // everything
  for (int round = 0; round < 500; ++round) {
    __pipeline_memcpy_async(cells + round % 2, in + round % 64, 4);
    __pipeline_commit();
    __pipeline_wait_prior(1);
  }
  __pipeline_wait_prior(0);
  out[48] = cells[0];
  out[49] = cells[1];
}

bool copies_arrive(const int* in) {
  const int absent = static_cast<int>(0xCDCDCDCDu);
  std::vector<int> out(50);
  launch(copies_kernel, 1, 1, 48, nullptr, in, out.data());
  const size_t arrived[4] = {0, 4, 8, 12};
  bool is_right = true;
  for (size_t row = 0; row < 4; ++row) {
    for (size_t i = 0; i < 12; ++i) {
      const int want = i < arrived[row] && i != 1 ? in[i] : absent;  // cell 1 is nobody's
      is_right = is_right && out[12 * row + i] == want;
    }
  }
  return is_right && out[48] == in[498 % 64] && out[49] == in[499 % 64];
}

__global__ void misaligned_copy_kernel(const int* in) {
  PIECE_OPS_DYNAMIC_SHARED(int, cells);
  __pipeline_memcpy_async(cells, in + 1, 16);
}

__global__ void odd_copy_kernel(const int* in) {
  PIECE_OPS_DYNAMIC_SHARED(int, cells);
  __pipeline_memcpy_async(cells, in, 12);
}

__global__ void copy_overrun_kernel(const int* in) {
  PIECE_OPS_DYNAMIC_SHARED(int, cells);
  __pipeline_memcpy_async(cells, in + 128, 16);  // 128 elements
  __pipeline_commit();
  __pipeline_wait_prior(0);
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
    if (is("none") || is("ticket_barrier") || is("ticket_release") || is("ticket_acquire")) {
      unsigned ticket = 0;
      std::vector<int> sums(2, 0);
      launch(last_block_kernel, 2, 64, 0, nullptr, in.data(), sums.data(), &ticket,
             is("ticket_barrier")   ? Ticket::kNoBarrier
             : is("ticket_release") ? Ticket::kNoRelease
             : is("ticket_acquire") ? Ticket::kNoAcquire
                                    : Ticket::kRight);
      if (sums[0] != 0 + 32 + 64 + 96 || ticket != 0) return 4;
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
    if (is("copies") && !copies_arrive(in.data())) return 4;
    if (is("ring")) return run_ring(RingMistake::kNone);
    if (is("no_wait")) return run_ring(RingMistake::kNoWait);
    if (is("wait_for_one_too_few")) return run_ring(RingMistake::kOneTooFew);
    if (is("overwritten_too_early")) return run_ring(RingMistake::kTooEarly);
    if (is("not_committed")) return run_ring(RingMistake::kNotCommitted);
    if (is("foreign_bytes")) return run_ring(RingMistake::kForeignBytes);
    if (is("misaligned_copy")) launch(misaligned_copy_kernel, 1, 1, 16, nullptr, in.data());
    if (is("odd_copy")) launch(odd_copy_kernel, 1, 1, 16, nullptr, in.data());
    if (is("copy_overrun")) launch(copy_overrun_kernel, 1, 1, 16, nullptr, in.data());
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
