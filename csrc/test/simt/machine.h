// machine.h - what the parts of the emulation share: the running block's threads, and who waits.
//
// fibers.cpp   stacks and the switch between them; who runs next
// grid.cpp     blocks one after another; deadlocks; the settings of simt.h
// meetings.cpp barriers and warp operations
// copies.cpp   asynchronous copies that have not arrived
// traffic.cpp  which pages a launch touches
//
// Under ThreadSanitizer (PIECE_OPS_SIMT_TSAN; these files themselves are compiled without it) every
// thread has a stack and a TSan fiber of its own, switched without an implied order; barriers order
// by release and acquire on an object that alternates by generation (with one object, the arrival
// at the next barrier would order what this one does not). Blocks are ordered on purpose, because
// they share the static arrays.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "simt.h"

#if defined(PIECE_OPS_SIMT_TSAN)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {

constexpr size_t kMaxThreads = 1024;  // of a block

#if defined(PIECE_OPS_SIMT_TSAN)
constexpr bool kTsan = true;
inline void tsan_release(void* address) { __tsan_release(address); }
inline void tsan_acquire(void* address) { __tsan_acquire(address); }
#else
constexpr bool kTsan = false;
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

struct Place {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
};

struct Thread;

// A stack of its own, with a page below it that must not be touched.
struct Fiber {
  void* stack_pointer = nullptr;
  char* memory = nullptr;
  Thread* thread = nullptr;  // whose code it runs
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

enum class State { kUnstarted, kRunning, kWaiting, kReady, kDone };

// A copy on its way, and which of the thread's groups it belongs to.
struct PendingCopy {
  Copy copy;
  size_t group;
};

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
  std::vector<PendingCopy> copies;
  size_t arrived = 0;       // of these
  size_t groups = 0;        // committed
  bool fenced = false;      // since its last barrier
  bool owes_fence = false;  // it drew a ticket
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
  int at_ticket = 0;  // threads of the block that came to its ticket
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

extern Machine machine;

// ---- fibers.cpp

// The running thread (or the launcher) lets others run; save: where its stack pointer goes.
void leave(void** save);
// The running thread waits there until it is released.
void wait(const Place& site);
void release(Thread* thread);
// Ends the launch with this error.
[[noreturn]] void stop(const std::string& text);
void start_tsan();  // before the first thread of a launch

// ---- grid.cpp

std::string where(const Place& site);

// ---- traffic.cpp

// A launch begins or ends: the watched pages are closed, or opened.
void close_watched_pages();
void open_watched_pages();

}  // namespace simt
