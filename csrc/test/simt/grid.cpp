// grid.cpp - blocks one after another, deadlocks, and the settings of the emulated machine.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace simt {

Machine machine;

std::string where(const Place& site) {
  std::ostringstream text;
  const char* base = site.file;
  for (const char* c = site.file; *c; ++c) {
    if (*c == '/') base = c + 1;
  }
  text << site.what << " at " << base << ":" << site.line;
  return text.str();
}

bool is_skipped(const char* file, int line) {
  if (machine.skip_line != line) return false;
  const std::string path = file;
  const std::string& suffix = machine.skip_file;
  if (path.size() < suffix.size() ||
      path.compare(path.size() - suffix.size(), suffix.size(), suffix) != 0) {
    return false;
  }
  ++machine.skipped;
  return true;
}

namespace {

std::mutex launching;
thread_local bool inside = false;

std::string describe_deadlock() {
  std::ostringstream text;
  text << "simt: deadlock in block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
       << "): " << machine.done << " of " << machine.n << " threads have ended";
  std::vector<std::string> places;
  std::vector<int> counts;
  std::vector<int> first;
  for (const Thread& thread : machine.threads) {
    if (thread.state != State::kWaiting) continue;
    const std::string place = where(thread.site);
    const auto at = std::find(places.begin(), places.end(), place);
    if (at == places.end()) {
      places.push_back(place);
      counts.push_back(1);
      first.push_back(thread.number);
    } else {
      ++counts[static_cast<size_t>(at - places.begin())];
    }
  }
  for (size_t i = 0; i < places.size(); ++i) {
    text << "; " << counts[i] << " wait in " << places[i] << " (first: thread " << first[i] << ")";
  }
  return text.str();
}

void shuffle_if_seeded(std::vector<int>& order, std::mt19937_64& random) {
  if (machine.seed == 0) return;
  std::shuffle(order.begin(), order.end(), random);
}

// Threads warp by warp; with a seed, warps and the lanes inside each are shuffled.
void make_start_order(std::mt19937_64& random) {
  const int n_warps = (machine.n + 31) / 32;
  std::vector<int> warps(static_cast<size_t>(n_warps));
  std::iota(warps.begin(), warps.end(), 0);
  shuffle_if_seeded(warps, random);
  machine.start_order.clear();
  for (const int warp : warps) {
    std::vector<int> lanes(static_cast<size_t>(std::min(32, machine.n - warp * 32)));
    std::iota(lanes.begin(), lanes.end(), warp * 32);
    shuffle_if_seeded(lanes, random);
    machine.start_order.insert(machine.start_order.end(), lanes.begin(), lanes.end());
  }
}

void run_block(std::mt19937_64& random, size_t shared_bytes) {
  Machine& m = machine;
  std::memset(m.shared, 0xCD, shared_bytes);
  m.done = 0;
  m.at_ticket = 0;
  m.next_start = 0;
  m.arrived = 0;
  m.sum = 0;
  m.barrier_waiting.clear();
  m.ready_begin = 0;
  m.ready_end = 0;
  for (int i = 0; i < m.n; ++i) {
    Thread& thread = m.threads[static_cast<size_t>(i)];
    thread.state = State::kUnstarted;
    thread.site = Place{};
    thread.copies.clear();
    thread.arrived = 0;
    thread.groups = 0;
    thread.fenced = false;
    thread.owes_fence = false;
    thread.number = i;
    thread.index.x = static_cast<unsigned>(i) % blockDim.x;
    thread.index.y = static_cast<unsigned>(i) / blockDim.x % blockDim.y;
    thread.index.z = static_cast<unsigned>(i) / blockDim.x / blockDim.y;
  }
  for (Warp& warp : m.warps) {
    for (auto& meeting : warp.meetings) meeting->arrived = 0;
  }
  m.idle.clear();
  for (auto& fiber : m.fibers) m.idle.push_back(fiber.get());
  make_start_order(random);

  tsan_release(&m.block_order);
  leave(&m.main_stack_pointer);
  tsan_acquire(&m.block_order);
  if (m.error.empty() && m.done != m.n) m.error = describe_deadlock();
  if (!m.error.empty()) {
    m.idle.clear();
    m.fibers.clear();  // stacks of threads that will not go on
    m.tsan_fibers.assign(m.tsan_fibers.size(), nullptr);
    throw Error(m.error);
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Body body, void* state) {
  Machine& m = machine;
  if (inside) throw Error("simt: a kernel launches another one");
  const std::lock_guard<std::mutex> one_launch(launching);  // callers may be several OS threads
  const int64_t n = int64_t{block.x} * block.y * block.z;
  if (n < 1 || n > int64_t{kMaxThreads}) throw Error("simt: a block must have 1..1024 threads");
  if (shared_bytes > (size_t{227} << 10)) throw Error("simt: more than 227 KiB of shared memory");
  count_launch();
  m.body = body;
  m.state = state;
  m.n = static_cast<int>(n);
  m.threads.resize(static_cast<size_t>(n));
  m.warps.resize(static_cast<size_t>((n + 31) / 32));
  // Reserved here, because a vector that grows inside a kernel would call memmove, which TSan sees.
  m.ready.resize(kMaxThreads);
  m.barrier_waiting.reserve(static_cast<size_t>(n));
  m.fibers.reserve(kMaxThreads);
  m.idle.reserve(kMaxThreads);
  m.tsan_fibers.resize(kMaxThreads);
  m.error.clear();
  blockDim = block;
  gridDim = grid;
  start_tsan();
  void* shared = nullptr;
  if (posix_memalign(&shared, 16, std::max<size_t>(shared_bytes, 16)) != 0) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
  if (shared_bytes < 16) {
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(shared) + shared_bytes, 16 - shared_bytes);
  }
#endif
  m.shared = shared;
  inside = true;
  m.main_bottom = nullptr;  // learnt by the first fiber: the caller may be another OS thread now
  const unsigned saved_mxcsr = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x1f80);  // subnormals kept, rounding to nearest: the GPU's only mode
  close_watched_pages();
  struct Restore {
    unsigned mxcsr;
    ~Restore() {
      open_watched_pages();
      __builtin_ia32_ldmxcsr(mxcsr);
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(machine.shared, 16);
#endif
      std::free(machine.shared);
      machine.shared = nullptr;
      inside = false;
    }
  } restore{saved_mxcsr};

  std::mt19937_64 random(m.seed);
  std::vector<int> blocks(size_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  shuffle_if_seeded(blocks, random);
  for (const int block_number : blocks) {
    const auto b = static_cast<unsigned>(block_number);
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    run_block(random, shared_bytes);
  }
}

void* dynamic_shared() { return machine.shared; }
void set_seed(uint64_t seed) { machine.seed = seed; }
void set_device(int multiprocessors, int blocks_per_multiprocessor) {
  machine.multiprocessors = multiprocessors;
  machine.blocks_per_multiprocessor = blocks_per_multiprocessor;
}
int multiprocessors() { return machine.multiprocessors; }
int blocks_per_multiprocessor() { return machine.blocks_per_multiprocessor; }
void skip_barrier(const char* file_suffix, int line) {
  machine.skip_file = file_suffix;
  machine.skip_line = line;
  machine.skipped = 0;
}
int64_t skipped_count() { return machine.skipped; }
int64_t launch_count() { return machine.launches; }
void count_launch() { ++machine.launches; }

}  // namespace simt
