// hd.h - the decoration of every function in math/: callable from host and device, always inlined.
//
// Always inlined, because these functions are included by files that are compiled for different
// instruction sets: an out-of-line copy would be merged by the linker into one, possibly the one
// that needs AVX-512.
#pragma once

#if defined(__CUDACC__)
#define PIECE_OPS_HD __host__ __device__ __forceinline__
#else
#define PIECE_OPS_HD inline __attribute__((always_inline))
#endif
