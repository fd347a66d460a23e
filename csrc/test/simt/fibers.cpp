// fibers.cpp - CUDA threads as fibers on one CPU thread: stacks, and who runs next.
//
// A fiber is started when a CUDA thread is; a thread that never waits runs to its end, and the next
// one starts on the same stack, so a kernel without barriers costs a plain call per thread. When a
// thread waits, a further fiber starts the next thread; when all have started, waiting ones
// continue in the order in which they were released. If none can, that is a deadlock.
#include <sys/mman.h>

#include <cstdlib>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(PIECE_OPS_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

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

char* bottom_of(const Fiber& fiber) { return fiber.memory + kGuardBytes; }

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
    before_switch(&fake, bottom_of(*fiber), kStackBytes);
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

[[noreturn]] void fiber_main();

Fiber* take_fiber() {
  if (machine.idle.empty()) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.idle.push_back(machine.fibers.back().get());
  }
  Fiber* fiber = machine.idle.back();
  machine.idle.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(bottom_of(*fiber), kStackBytes);
#endif
  // What piece_ops_simt_switch pops: six registers, then the address to return to. At a function's
  // entry the stack pointer is 8 past a multiple of 16.
  auto** top = reinterpret_cast<void**>(bottom_of(*fiber) + kStackBytes) - 1;
  top[0] = nullptr;  // fiber_main's own return address
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
  return fiber;
}

}  // namespace

Fiber::Fiber() {
  void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  memory = static_cast<char*>(p);
  mprotect(memory, kGuardBytes, PROT_NONE);
}
Fiber::~Fiber() { munmap(memory, kGuardBytes + kStackBytes); }

void release(Thread* thread) {
  thread->state = State::kReady;
  machine.ready[machine.ready_end++ % kMaxThreads] = thread;
}

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

void stop(const std::string& text) {
  if (machine.error.empty()) machine.error = text;
  void* ignored;
  switch_to(&ignored, nullptr);
  std::abort();  // nobody switches back
}

void start_tsan() {
#if defined(PIECE_OPS_SIMT_TSAN)
  machine.tsan_main = __tsan_get_current_fiber();
#endif
}

namespace {

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

}  // namespace

}  // namespace simt
