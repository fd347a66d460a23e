// scratch.h - memory for the duration of a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace piece_ops::cpu {

// n uninitialised numbers on a cache line's boundary, so that no vector straddles two lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : store_(new T[static_cast<size_t>(n) + kLine / sizeof(T)]) {}
  T* data() const {
    const auto address = reinterpret_cast<uintptr_t>(store_.get());
    return reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<T[]> store_;
};

}  // namespace piece_ops::cpu
