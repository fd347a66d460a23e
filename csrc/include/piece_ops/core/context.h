// context.h - where and with how much an op runs; passed by the caller, never global.
#pragma once

namespace piece_ops {

struct Context {
  int threads = 1;         // CPU: threads of the parallel region, at most
  int device = 0;          // CUDA: index of the device, made current by every launcher
  void* stream = nullptr;  // CUDA: the caller's current stream
};

}  // namespace piece_ops
