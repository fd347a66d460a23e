// parallel.h - tiles of many tensors, and the parallel loop over them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace piece_ops::cpu {

// 64 Ki elements: 256 KiB of float32 stay in L2, and a tile takes some 10 us, long against the
// cost of handing it out.
constexpr int64_t kTile = 64 * 1024;

// A piece of one tensor.
struct Tile {
  int64_t tensor;
  int64_t begin;
  int64_t n;
};

// Tiles in the caller's order. sizes(t) is the element count of tensor t.
template <class Sizes>
std::vector<Tile> make_tiles(int64_t count, Sizes sizes, int64_t tile_size = kTile) {
  std::vector<Tile> tiles;
  tiles.reserve(static_cast<size_t>(count));
  for (int64_t t = 0; t < count; ++t) {
    const int64_t n = sizes(t);
    for (int64_t begin = 0; begin < n; begin += tile_size) {
      tiles.push_back({t, begin, std::min(tile_size, n - begin)});
    }
  }
  return tiles;
}

inline int64_t elements_of(const std::vector<Tile>& tiles) {
  int64_t n = 0;
  for (const Tile& tile : tiles) n += tile.n;
  return n;
}

// Sets the IEEE floating-point environment for its lifetime: round to nearest, subnormals kept.
// Callers switch flush-to-zero on (torch.set_flush_denormal) or have -ffast-math libraries do it;
// it would change the order of scores.
class IeeeEnvironment {
 public:
#if defined(__x86_64__)
  IeeeEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kChanged); }
  ~IeeeEnvironment() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kChanged = 0x8000u | 0x6000u | 0x0040u;  // FTZ, rounding mode, DAZ
  unsigned saved_;
#else
  // Other CPUs start in this state; nothing in the library leaves it.
  IeeeEnvironment() = default;
#endif
  IeeeEnvironment(const IeeeEnvironment&) = delete;
  IeeeEnvironment& operator=(const IeeeEnvironment&) = delete;
};

// Below this many elements one thread is faster than waking others.
constexpr int64_t kSerialElements = 32 * 1024;

inline int usable_threads(int threads, int64_t n_tiles, int64_t n_elements) {
  if (n_elements <= kSerialElements) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, n_tiles)));
}

// body(thread, i) for every i < n, on `threads` threads, handed out `chunk` at a time in rising
// order. An exception (memory, nearly always) stops the loop and is thrown to the caller.
template <class Body>
void parallel_for(int threads, int64_t n, int64_t chunk, Body body) {
  if (threads <= 1) {
    const IeeeEnvironment environment;
    for (int64_t i = 0; i < n; ++i) body(0, i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  // A loop of its own, not "omp for": a thread must be able to leave it after an exception.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const IeeeEnvironment environment;
    try {
      while (!failed.load(std::memory_order_relaxed)) {
        const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= n) break;
        const int64_t end = std::min(n, begin + chunk);
        for (int64_t i = begin; i < end; ++i) body(thread, i);
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace piece_ops::cpu
