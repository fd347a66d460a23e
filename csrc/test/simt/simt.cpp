// simt.cpp - the scheduler: CUDA threads as fibers on one CPU thread.
//
// A fiber is started when a CUDA thread is; a thread that never waits runs to its end, and the next
// one starts on the same stack, so a kernel without barriers costs a plain call per thread. When a
// thread waits, a further fiber starts the next thread; when all have started, waiting ones
// continue in the order in which they were released. If none can, that is a deadlock.
//
// Under ThreadSanitizer (PIECE_OPS_SIMT_TSAN; this file itself is compiled without it) every thread
// has a stack and a TSan fiber of its own, switched without an implied order; barriers order by
// release and acquire on an object that alternates by generation (with one object, the arrival at
// the next barrier would order what this one does not). Blocks are ordered on purpose, because they
// share the static arrays.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(PIECE_OPS_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembler; add the switch of this CPU"
#endif

// Saves the callee-saved registers and the stack pointer to *from, then continues at `to`.
extern "C" void piece_ops_simt_switch(void** from, void* to);
asm(R"(
.text
.globl piece_ops_simt_switch
.hidden piece_ops_simt_switch
.type piece_ops_simt_switch, @function
piece_ops_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size piece_ops_simt_switch, .-piece_ops_simt_switch
)");

namespace simt {

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // touched pages only are real; sanitizers need much
constexpr size_t kGuardBytes = 4096;
constexpr size_t kMaxThreads = 1024;  // of a block

#if defined(PIECE_OPS_SIMT_TSAN)
constexpr bool kTsan = true;
void tsan_release(void* address) { __tsan_release(address); }
void tsan_acquire(void* address) { __tsan_acquire(address); }
#else
constexpr bool kTsan = false;
void tsan_release(void*) {}
void tsan_acquire(void*) {}
#endif

struct Place {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
};

struct Thread;

struct Fiber {
  void* stack_pointer = nullptr;
  char* memory = nullptr;
  Thread* thread = nullptr;  // whose code it runs
  Fiber() {
    void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(p);
    mprotect(memory, kGuardBytes, PROT_NONE);
  }
  ~Fiber() { munmap(memory, kGuardBytes + kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  char* bottom() const { return memory + kGuardBytes; }
};

enum class State { kUnstarted, kRunning, kWaiting, kReady, kDone };

struct Thread {
  State state = State::kUnstarted;
  uint3 index{};
  int number = 0;
  Fiber* fiber = nullptr;
  Place site;   // where it waits
  WarpOp op{};  // what it brings to its warp
  unsigned mask = 0;
  uint64_t value = 0;
  int source = 0;
  uint64_t result = 0;
};

// Lanes that meet under one mask.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  int generation = 0;
  char order[2];  // what TSan's release and acquire name
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Machine {
  uint64_t seed = 0;
  int multiprocessors = 3;
  int blocks_per_multiprocessor = 2;
  std::string skip_file;
  int skip_line = 0;
  int64_t skipped = 0;
  int64_t launches = 0;

  // The running grid.
  Body body = nullptr;
  void* state = nullptr;
  int n = 0;  // threads of a block
  std::vector<Thread> threads;
  std::vector<int> start_order;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;  // a ring: ready_begin .. ready_end, modulo its 1024 places
  size_t ready_begin = 0;
  size_t ready_end = 0;
  int next_start = 0;
  int done = 0;
  Thread* current = nullptr;

  // The block's barrier.
  int arrived = 0;
  int sum = 0;
  int barrier_generation = 0;
  Barrier barrier_kind{};
  int barrier_result[2] = {};
  std::vector<Thread*> barrier_waiting;
  char barrier_order[2];
  char block_order = 0;

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::vector<void*> tsan_fibers;
  void* tsan_main = nullptr;
  void* main_stack_pointer = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  std::string error;

  void* shared = nullptr;
};

Machine machine;
std::mutex launching;
thread_local bool inside = false;

void activate(Thread* thread) {
  machine.current = thread;
  threadIdx = thread->index;
  thread->state = State::kRunning;
}

void enter_tsan(Thread* thread) {
  (void)thread;
#if defined(PIECE_OPS_SIMT_TSAN)
  if (thread == nullptr) {
    __tsan_switch_to_fiber(machine.tsan_main, 1);
    return;
  }
  void*& fiber = machine.tsan_fibers[static_cast<size_t>(thread->number)];
  if (fiber == nullptr) fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(fiber, 1);
#endif
}

void before_switch(void** fake, const void* bottom, size_t size) {
  (void)fake, (void)bottom, (void)size;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}
void after_switch(void* fake, const void** bottom, size_t* size) {
  (void)fake, (void)bottom, (void)size;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
}

// From the running fiber (save: where its stack pointer goes) to another, or to main (null).
void switch_to(void** save, Fiber* fiber) {
  void* fake = nullptr;
  enter_tsan(fiber ? fiber->thread : nullptr);
  if (fiber) {
    before_switch(&fake, fiber->bottom(), kStackBytes);
    piece_ops_simt_switch(save, fiber->stack_pointer);
  } else {
    before_switch(&fake, machine.main_bottom, machine.main_size);
    piece_ops_simt_switch(save, machine.main_stack_pointer);
  }
  after_switch(fake, nullptr, nullptr);
}

Thread* take_unstarted() {
  if (machine.next_start >= machine.n) return nullptr;
  return &machine.threads[static_cast<size_t>(machine.start_order[machine.next_start++])];
}

Thread* take_ready() {
  if (machine.ready_begin == machine.ready_end) return nullptr;
  return machine.ready[machine.ready_begin++ % kMaxThreads];
}

void release(Thread* thread) {
  thread->state = State::kReady;
  machine.ready[machine.ready_end++ % kMaxThreads] = thread;
}

[[noreturn]] void fiber_main();

Fiber* take_fiber() {
  if (machine.idle.empty()) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.idle.push_back(machine.fibers.back().get());
  }
  Fiber* fiber = machine.idle.back();
  machine.idle.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber->bottom(), kStackBytes);
#endif
  // What piece_ops_simt_switch pops: six registers, then the address to return to. At a function's
  // entry the stack pointer is 8 past a multiple of 16.
  auto** top = reinterpret_cast<void**>(fiber->bottom() + kStackBytes) - 1;
  top[0] = nullptr;  // fiber_main's own return address
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
  return fiber;
}

// The next thing to run, from a fiber that cannot go on; save as in switch_to.
void leave(void** save) {
  if (Thread* thread = take_unstarted()) {
    Fiber* fiber = take_fiber();
    fiber->thread = thread;
    thread->fiber = fiber;
    activate(thread);
    switch_to(save, fiber);
  } else if (Thread* ready = take_ready()) {
    activate(ready);
    switch_to(save, ready->fiber);
  } else {
    machine.current = nullptr;
    switch_to(save, nullptr);
  }
}

void wait(const Place& site) {
  Thread* me = machine.current;
  me->state = State::kWaiting;
  me->site = site;
  leave(&me->fiber->stack_pointer);
  me->site = Place{};
}

[[noreturn]] void stop(const std::string& text) {
  if (machine.error.empty()) machine.error = text;
  void* ignored;
  switch_to(&ignored, nullptr);
  std::abort();  // nobody switches back
}

void fiber_main() {
  after_switch(nullptr, machine.main_bottom ? nullptr : &machine.main_bottom,
               machine.main_bottom ? nullptr : &machine.main_size);
  Fiber* fiber = machine.current->fiber;
  for (;;) {
    Thread* me = fiber->thread;
    tsan_acquire(&machine.block_order);
    machine.body(machine.state);
    tsan_release(&machine.block_order);
    me->state = State::kDone;
    ++machine.done;
    Thread* next = kTsan ? nullptr : take_unstarted();
    if (next == nullptr) break;
    next->fiber = fiber;
    fiber->thread = next;
    activate(next);
  }
  if (!kTsan) machine.idle.push_back(fiber);  // TSan: its stack rests until the block ends
  void* ignored;
  leave(&ignored);
  std::abort();
}

std::string where(const Place& site) {
  std::ostringstream text;
  const char* base = site.file;
  for (const char* c = site.file; *c; ++c) {
    if (*c == '/') base = c + 1;
  }
  text << site.what << " at " << base << ":" << site.line;
  return text.str();
}

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

// The lanes of the mask are all there: what each of them gets.
void conclude(Warp& warp, Meeting& meeting, Thread* lanes) {
  (void)warp;
  uint64_t ballot = 0;
  uint64_t sum = 0;
  uint64_t all_or = 0;
  uint64_t all_and = ~uint64_t{0};
  uint64_t most = 0;
  uint64_t least = ~uint64_t{0};
  const WarpOp op = machine.current->op;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(meeting.mask >> lane & 1u)) continue;
    const uint64_t value = lanes[lane].value;
    ballot |= (value ? uint64_t{1} : 0) << lane;
    sum += value;
    all_or |= value;
    all_and &= value;
    most = std::max(most, value);
    least = std::min(least, value);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(meeting.mask >> lane & 1u)) continue;
    Thread& thread = lanes[lane];
    if (thread.op != op) {
      stop("simt: lanes of one warp meet in different operations: " + where(thread.site) + " and " +
           where(machine.current->site));
    }
    switch (op) {
      case WarpOp::kSync:
        break;
      case WarpOp::kShuffle:
        if (!(meeting.mask >> (thread.source & 31) & 1u)) {
          stop("simt: lane " + std::to_string(lane) + " shuffles from lane " +
               std::to_string(thread.source) + ", which is not in the mask; " + where(thread.site));
        }
        thread.result = lanes[thread.source & 31].value;
        break;
      case WarpOp::kBallot:
        thread.result = ballot;
        break;
      case WarpOp::kAny:
        thread.result = ballot != 0;
        break;
      case WarpOp::kAll:
        thread.result = ballot == meeting.mask;
        break;
      case WarpOp::kMatch:
        thread.result = 0;
        for (int other = 0; other < 32; ++other) {
          if ((meeting.mask >> other & 1u) && lanes[other].value == thread.value) {
            thread.result |= uint64_t{1} << other;
          }
        }
        break;
      case WarpOp::kAdd:
        thread.result = sum;
        break;
      case WarpOp::kMax:
        thread.result = most;
        break;
      case WarpOp::kMin:
        thread.result = least;
        break;
      case WarpOp::kOr:
        thread.result = all_or;
        break;
      case WarpOp::kAnd:
        thread.result = all_and;
        break;
    }
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
  ++m.launches;
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
#if defined(PIECE_OPS_SIMT_TSAN)
  m.tsan_main = __tsan_get_current_fiber();
#endif
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
  struct Restore {
    unsigned mxcsr;
    ~Restore() {
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
int lane() { return machine.current->number & 31; }

int sync_threads(Barrier kind, int predicate, const char* file, int line) {
  Machine& m = machine;
  if (kind == Barrier::kPlain && is_skipped(file, line)) return 0;
  const Place site{"__syncthreads", file, line};
  const int half = m.barrier_generation & 1;
  if (m.arrived == 0) {
    m.barrier_kind = kind;
  } else if (m.barrier_kind != kind) {
    stop("simt: different kinds of barrier meet; one is " + where(site));
  }
  tsan_release(&m.barrier_order[half]);
  m.sum += predicate;
  if (++m.arrived < m.n) {
    m.barrier_waiting.push_back(m.current);
    wait(site);
  } else {
    m.barrier_result[half] = kind == Barrier::kAnd  ? m.sum == m.n
                             : kind == Barrier::kOr ? m.sum != 0
                                                    : m.sum;
    ++m.barrier_generation;
    m.arrived = 0;
    m.sum = 0;
    for (Thread* thread : m.barrier_waiting) release(thread);
    m.barrier_waiting.clear();
  }
  tsan_acquire(&m.barrier_order[half]);
  return m.barrier_result[half];
}

uint64_t meet_warp(WarpOp op, unsigned mask, uint64_t value, int source, const char* what,
                   const char* file, int line) {
  Machine& m = machine;
  if (op == WarpOp::kSync && is_skipped(file, line)) return 0;
  Thread* me = m.current;
  const int my_lane = me->number & 31;
  const int first = me->number & ~31;
  const Place site{what, file, line};
  if (!(mask >> my_lane & 1u)) {
    stop("simt: lane " + std::to_string(my_lane) + " is not in its own mask; " + where(site));
  }
  const int lanes = std::min(32, m.n - first);
  const unsigned existing = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
  if (mask & ~existing) {
    stop("simt: the mask names lanes that this block does not have; " + where(site));
  }
  Warp& warp = m.warps[static_cast<size_t>(first / 32)];
  Meeting* meeting = nullptr;
  for (auto& known : warp.meetings) {
    if (known->mask == mask) meeting = known.get();
  }
  if (meeting == nullptr) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    meeting = warp.meetings.back().get();
    meeting->mask = mask;
  }
  const int half = meeting->generation & 1;
  if (op == WarpOp::kSync) tsan_release(&meeting->order[half]);
  me->op = op;
  me->mask = mask;
  me->value = value;
  me->source = source;
  me->site = site;
  meeting->arrived |= 1u << my_lane;
  if (meeting->arrived != mask) {
    wait(site);
  } else {
    Thread* lane_threads = &m.threads[static_cast<size_t>(first)];
    conclude(warp, *meeting, lane_threads);
    meeting->arrived = 0;
    ++meeting->generation;
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1u) && lane != my_lane) release(&lane_threads[lane]);
    }
    me->site = Place{};
  }
  if (op == WarpOp::kSync) tsan_acquire(&meeting->order[half]);
  return me->result;
}

}  // namespace simt
