// copies.cpp - asynchronous copies: which are on their way, and which a wait must see arrive.
#include "machine.h"

namespace simt {

namespace {

constexpr size_t kMostCopies = 256;  // of a thread, on their way at one time

}  // namespace

void start_copy(const Copy& copy) {
  Thread& me = *machine.current;
  const auto is_aligned = [&copy](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % copy.bytes == 0;
  };
  if (copy.bytes != 4 && copy.bytes != 8 && copy.bytes != 16) {
    stop("simt: an asynchronous copy of " + std::to_string(copy.bytes) +
         " bytes; it must be 4, 8 or 16");
  }
  if (!is_aligned(copy.to) || !is_aligned(copy.from)) {
    stop("simt: a misaligned asynchronous copy of " + std::to_string(copy.bytes) + " bytes");
  }
  if (me.arrived == me.copies.size()) {
    me.copies.clear();
    me.arrived = 0;
  }
  // Reserved at once: a vector that grows inside a kernel would call memmove, which TSan sees.
  if (me.copies.capacity() == 0) me.copies.reserve(kMostCopies);
  if (me.copies.size() == kMostCopies) {
    if (me.arrived == 0) stop("simt: more than 256 asynchronous copies of one thread");
    size_t kept = 0;
    for (size_t i = me.arrived; i < me.copies.size(); ++i) me.copies[kept++] = me.copies[i];
    me.copies.resize(kept);
    me.arrived = 0;
  }
  me.copies.push_back({copy, me.groups});
}

void commit_copies() { ++machine.current->groups; }

Copy arriving_copy(size_t prior) {
  Thread& me = *machine.current;
  if (me.arrived == me.copies.size() || me.copies[me.arrived].group + prior >= me.groups) {
    return {nullptr, nullptr, 0};
  }
  return me.copies[me.arrived++].copy;
}

}  // namespace simt
