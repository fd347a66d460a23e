// check.h - errors of the native code: thrown, never printed; the binding turns them into Python's.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace piece_ops {

enum class ErrorKind { kArgument, kUnsupported, kCuda, kInternal };

struct Error : std::runtime_error {
  Error(ErrorKind error_kind, const std::string& text)
      : std::runtime_error(text), kind(error_kind) {}
  ErrorKind kind;
};

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(kind, text.str());
}

}  // namespace piece_ops

// PIECE_OPS_CHECK(k <= n, "piece_ops.op: k must be at most ", n, ", got ", k)
#define PIECE_OPS_CHECK(condition, ...)                                                  \
  do {                                                                                   \
    if (!(condition)) ::piece_ops::fail(::piece_ops::ErrorKind::kArgument, __VA_ARGS__); \
  } while (0)
