// traffic.cpp - how much of some memory each launch touches, in pages: what a kernel reads is
// counted without the kernel's help.
//
// While a launch runs, the watched pages are closed; the first access to each opens it, in a signal
// handler, and counts. What one launch touches twice counts once. Not under sanitizers, which keep
// shadows of their own.
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>

#include "machine.h"

namespace simt {

namespace {

char* watched = nullptr;
size_t watched_bytes = 0;
int64_t touched = 0;  // in this launch
std::vector<int64_t> all_touched;
struct sigaction before;

void on_fault(int signal, siginfo_t* info, void* context) {
  char* const address = static_cast<char*>(info->si_addr);
  if (address < watched || address >= watched + watched_bytes) {  // a real one
    sigaction(SIGSEGV, &before, nullptr);
    if ((before.sa_flags & SA_SIGINFO) != 0) before.sa_sigaction(signal, info, context);
    return;
  }
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* const start = watched + static_cast<size_t>(address - watched) / page * page;
  mprotect(start, page, PROT_READ | PROT_WRITE);
  ++touched;
}

}  // namespace

void watch(void* memory, size_t bytes) {
  watched = static_cast<char*>(memory);
  watched_bytes = bytes;
  all_touched.clear();
}

const std::vector<int64_t>& touched_pages() { return all_touched; }

void close_watched_pages() {
  if (watched_bytes == 0) return;
  touched = 0;
  struct sigaction now{};
  now.sa_sigaction = on_fault;
  now.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &now, &before);
  mprotect(watched, watched_bytes, PROT_NONE);
}

void open_watched_pages() {
  if (watched_bytes == 0) return;
  mprotect(watched, watched_bytes, PROT_READ | PROT_WRITE);
  sigaction(SIGSEGV, &before, nullptr);
  if (touched > 0) all_touched.push_back(touched);
}

}  // namespace simt
