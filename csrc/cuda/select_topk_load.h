// select_topk_load.h - scores in registers: one warp's part of a tile, or one element.
//
// A lane holds kPerLane<T> scores of its warp's part. With V scores of a 16-byte load (of the wider
// input, where there are two), score j of lane l is slot
//
//     (j / V) * 32 V  +  l V  +  j % V          so that a warp's load covers 512 consecutive bytes
//
// Loads of a part are all issued before the first is used. A part that is cut off by an end of its
// tensor, or whose second input is aligned differently, is read element by element.
#pragma once

#include <type_traits>

#include "element.h"
#include "piece_ops/math/rounding.h"
#include "select_topk_types.h"

#if !defined(PIECE_OPS_CUDA_EMULATION)
#include <cuda_fp16.h>
#endif

namespace piece_ops::cuda {

#define PIECE_OPS_DEVICE __device__ __forceinline__

template <class T>
constexpr int kPerLane = sizeof(T) == 4 ? 32 : 16;
template <class T>
constexpr int kPartSlots = kWarp * kPerLane<T>;  // of one warp
template <class T>
constexpr int kTileThreads = kTileSlots / kPerLane<T>;
template <class T>
constexpr int kTileWarps = kTileThreads<T> / kWarp;

template <TopkInput kInput>
constexpr int kSeconds = kInput == TopkInput::kTwo ? 32 : 1;  // second inputs of a lane, if any

template <TopkInput kInput>
using ScoreOf = std::conditional_t<kInput == TopkInput::kDouble, double, float>;

// Float16 to float32 is exact, so the hardware's conversion equals rounding.h's.
PIECE_OPS_DEVICE float widen_fp16(uint32_t bits) {
#if defined(PIECE_OPS_CUDA_EMULATION)
  return fp16_to_float(static_cast<uint16_t>(bits));
#else
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#endif
}

// Aligned loads of data that is read once.
#if defined(PIECE_OPS_CUDA_EMULATION)
struct __attribute__((may_alias, aligned(16))) Bytes16 {
  uint32_t x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) Bytes8 {
  uint32_t x, y;
};
PIECE_OPS_DEVICE uint4 load_16(const void* p) {
  const Bytes16 b = *static_cast<const Bytes16*>(p);
  return make_uint4(b.x, b.y, b.z, b.w);
}
PIECE_OPS_DEVICE uint2 load_8(const void* p) {
  const Bytes8 b = *static_cast<const Bytes8*>(p);
  return make_uint2(b.x, b.y);
}
PIECE_OPS_DEVICE uint4 load_shared_16(const void* p) { return load_16(p); }
PIECE_OPS_DEVICE uint2 load_shared_8(const void* p) { return load_8(p); }
#else
PIECE_OPS_DEVICE uint4 load_16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
PIECE_OPS_DEVICE uint2 load_8(const void* p) { return __ldcs(static_cast<const uint2*>(p)); }
PIECE_OPS_DEVICE uint4 load_shared_16(const void* p) { return *static_cast<const uint4*>(p); }
PIECE_OPS_DEVICE uint2 load_shared_8(const void* p) { return *static_cast<const uint2*>(p); }
#endif

template <int V>
PIECE_OPS_DEVICE int part_slot(int j, int lane) {
  return (j / V) * (kWarp * V) + lane * V + j % V;
}

PIECE_OPS_DEVICE int64_t element_bytes(int32_t dtype) {
  return static_cast<DType>(dtype) == DType::kFloat32 ? 4 : 2;
}

// ---- one element --------------------------------------------------------------------------------

template <TopkInput kInput>
PIECE_OPS_DEVICE ScoreOf<kInput> score_at(const TopkRow& row, const TopkFormula& formula,
                                          int64_t i) {
  if constexpr (kInput == TopkInput::kDouble) {
    return static_cast<const double*>(row.first)[i];
  } else if constexpr (kInput == TopkInput::kHash) {
    return score_random(formula.seed, row.position + i);
  } else if constexpr (kInput == TopkInput::kTwo) {
    const float first = load_float(row.first, static_cast<DType>(row.first_dtype), i);
    const float second = load_float(row.second, static_cast<DType>(row.second_dtype), i);
    return evaluate_score(formula.score, first, second, formula.constant);
  } else {
    const float first = load_float(row.first, static_cast<DType>(row.first_dtype), i);
    return formula.score == Score::kMagnitude ? absolute(first) : first;
  }
}

// Is `position` one of list[begin .. end), which rises?
PIECE_OPS_DEVICE bool is_listed(const int64_t* list, int64_t begin, int64_t end, int64_t position) {
  const int64_t stop = end;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (list[middle] < position) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin < stop && list[begin] == position;
}

// The excluded entries of a tile.
struct Excluded {
  const int64_t* list;
  int64_t begin;
  int64_t end;

  PIECE_OPS_DEVICE bool any() const { return begin < end; }
  PIECE_OPS_DEVICE bool has(int64_t position) const {
    return is_listed(list, begin, end, position);
  }
};

PIECE_OPS_DEVICE Excluded excluded_of(const TopkTable& table, const TopkRow& row, int64_t tile,
                                      int64_t tensor) {
  if (table.exclude_starts == nullptr) return {nullptr, 0, 0};
  const bool is_last = tile + 1 == table.first_tile(tensor + 1);
  return {row.exclude, table.exclude_starts[tile],
          is_last ? row.exclude_n : table.exclude_starts[tile + 1]};
}

// ---- one warp's part ----------------------------------------------------------------------------

// Calls visit(bytes, i, address) for each load of this lane in a part, bytes = 16 or 8 at compile
// time: load i has the bytes of words [i * bytes / 4, (i + 1) * bytes / 4) of the part as it lies in
// memory. Word j / 2 holds elements j and j + 1 of a 16-bit type, word j one of float32, words 2 j
// and 2 j + 1 one of float64.
template <int V, class Visit>
PIECE_OPS_DEVICE void each_load(const void* data, int32_t dtype, int64_t begin, int lane,
                                Visit visit) {
  constexpr std::integral_constant<int, 16> kSixteen{};
  constexpr int kApart = kWarp * V;  // elements, so that one address serves all loads
  if constexpr (V == 2) {            // float64
    const double* p = static_cast<const double*>(data) + begin + lane * V;
#pragma unroll
    for (int i = 0; i < 8; ++i) visit(kSixteen, i, p + i * kApart);
  } else if constexpr (V == 8) {  // a 16-bit type
    const uint16_t* p = static_cast<const uint16_t*>(data) + begin + lane * V;
#pragma unroll
    for (int i = 0; i < 4; ++i) visit(kSixteen, i, p + i * kApart);
  } else if (static_cast<DType>(dtype) == DType::kFloat32) {
    const float* p = static_cast<const float*>(data) + begin + lane * V;
#pragma unroll
    for (int i = 0; i < 8; ++i) visit(kSixteen, i, p + i * kApart);
  } else {
    constexpr std::integral_constant<int, 8> kEight{};
    const uint16_t* p = static_cast<const uint16_t*>(data) + begin + lane * V;
#pragma unroll
    for (int i = 0; i < 8; ++i) visit(kEight, i, p + i * kApart);
  }
}

// Where a whole part is read from: global memory (here), or a ring's stage (select_topk_ring.h).
struct FromMemory {
  PIECE_OPS_DEVICE uint4 get(std::integral_constant<int, 16>, int, const void* p) const {
    return load_16(p);
  }
  PIECE_OPS_DEVICE uint2 get(std::integral_constant<int, 8>, int, const void* p) const {
    return load_8(p);
  }
  PIECE_OPS_DEVICE FromMemory second() const { return {}; }
};

PIECE_OPS_DEVICE void put_words(const uint4& four, uint32_t* words) {
  words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
}
PIECE_OPS_DEVICE void put_words(const uint2& two, uint32_t* words) {
  words[0] = two.x, words[1] = two.y;
}

template <int V, class Source>
PIECE_OPS_DEVICE void load_words(const void* data, int32_t dtype, int64_t begin, int lane,
                                 const Source& source, uint32_t (&words)[32]) {
  each_load<V>(data, dtype, begin, lane, [&](auto bytes, int i, const void* p) {
    put_words(source.get(bytes, i, p), words + i * (decltype(bytes)::value / 4));
  });
}

PIECE_OPS_DEVICE void widen_words(int32_t dtype, const uint32_t (&words)[32], float (&x)[32]) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
#pragma unroll
      for (int j = 0; j < 32; ++j) x[j] = bit_cast<float>(words[j]);
      break;
    case DType::kBFloat16:
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const uint32_t word = words[j / 2];
        x[j] = bit_cast<float>(j % 2 ? word & 0xffff0000u : word << 16);
      }
      break;
    default:
#pragma unroll
      for (int j = 0; j < 32; ++j) x[j] = widen_fp16(j % 2 ? words[j / 2] >> 16 : words[j / 2]);
  }
}

// x = the score of (x, second); the switch stands outside the loops.
PIECE_OPS_DEVICE void combine(const TopkFormula& formula, const float (&second)[32],
                              float (&x)[32]) {
  switch (formula.score) {
    case Score::kPieceS:
#pragma unroll
      for (int j = 0; j < 32; ++j) x[j] = score_piece_s(x[j], second[j], formula.constant);
      break;
    case Score::kPieceG:
#pragma unroll
      for (int j = 0; j < 32; ++j) x[j] = score_piece_g(x[j], second[j], formula.constant);
      break;
    case Score::kSnip:
#pragma unroll
      for (int j = 0; j < 32; ++j) x[j] = score_snip(x[j], second[j]);
      break;
    default:
#pragma unroll
      for (int j = 0; j < 32; ++j) x[j] = score_taylor(x[j], second[j]);
  }
}

// To a power of two.
PIECE_OPS_DEVICE bool is_aligned(const void* data, int64_t offset_bytes, int64_t alignment) {
  return ((reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(offset_bytes)) &
          static_cast<uintptr_t>(alignment - 1)) == 0;
}

// The dtype of the first input, as far as the width of its loads tells it.
template <TopkInput kInput, int V>
PIECE_OPS_DEVICE int32_t first_dtype(const TopkRow& row) {
  return kInput == TopkInput::kOne && V == 4 ? static_cast<int32_t>(DType::kFloat32)
                                             : row.first_dtype;
}

// Are all slots of the part elements, and its loads aligned? A load has 16 bytes; of two inputs, four
// elements of each. No branch: all look-ups are under way together.
template <TopkInput kInput>
PIECE_OPS_DEVICE bool is_whole_part(const TopkRow& row, int64_t begin) {
  using T = ScoreOf<kInput>;
  const int64_t first_bytes = sizeof(T) == 8 ? 8 : element_bytes(row.first_dtype);
  bool is_whole = (begin >= 0) & (begin + kPartSlots<T> <= row.n);
  if constexpr (kInput == TopkInput::kTwo) {
    const int64_t second_bytes = element_bytes(row.second_dtype);
    is_whole &= is_aligned(row.first, begin * first_bytes, 4 * first_bytes) &
                is_aligned(row.second, begin * second_bytes, 4 * second_bytes);
  } else {
    is_whole &= is_aligned(row.first, begin * first_bytes, 16);
  }
  return is_whole;
}

// What a whole part's scores are made of: the first input, and the second where there is one.
template <TopkInput kInput, int V, class Source>
PIECE_OPS_DEVICE void load_inputs(const TopkRow& row, int64_t begin, int lane, const Source& source,
                                  ScoreOf<kInput> (&first)[kPerLane<ScoreOf<kInput>>],
                                  float (&second)[kSeconds<kInput>]) {
  static_assert(kInput != TopkInput::kHash, "there is nothing to load");
  uint32_t words[32];
  const int32_t dtype = first_dtype<kInput, V>(row);
  load_words<V>(row.first, dtype, begin, lane, source, words);
  if constexpr (kInput == TopkInput::kDouble) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      first[j] = bit_cast<double>(words[2 * j] | static_cast<uint64_t>(words[2 * j + 1]) << 32);
    }
  } else {
    widen_words(dtype, words, first);
    if constexpr (kInput == TopkInput::kTwo) {
      uint32_t second_words[32];
      load_words<V>(row.second, row.second_dtype, begin, lane, source.second(), second_words);
      widen_words(row.second_dtype, second_words, second);
    }
  }
}

// x = the score of x, and of second where there is one.
template <TopkInput kInput>
PIECE_OPS_DEVICE void evaluate(const TopkFormula& formula, const float (&second)[kSeconds<kInput>],
                               ScoreOf<kInput> (&x)[kPerLane<ScoreOf<kInput>>]) {
  if constexpr (kInput == TopkInput::kTwo) {
    combine(formula, second, x);
  } else if constexpr (kInput == TopkInput::kOne) {
    if (formula.score != Score::kMagnitude) return;
#pragma unroll
    for (int j = 0; j < 32; ++j) x[j] = absolute(x[j]);
  }
}

template <class T>
constexpr uint32_t kAllOfPart = kPerLane<T> == 32 ? 0xffffffffu : (1u << (kPerLane<T> % 32)) - 1;

// Scores of any part, one by one; bit j of the result: x[j] exists. What does not exist is below
// everything.
template <TopkInput kInput, int V>
PIECE_OPS_DEVICE uint32_t load_elements_of_part(const TopkRow& row, const TopkFormula& formula,
                                                int64_t begin, int lane,
                                                ScoreOf<kInput> (&x)[kPerLane<ScoreOf<kInput>>]) {
  using T = ScoreOf<kInput>;
  const int64_t left = row.n - begin;
  const int first = begin < 0 ? static_cast<int>(-begin) : 0;  // slots that exist: first .. end - 1
  const int end = left < kPartSlots<T> ? static_cast<int>(left) : kPartSlots<T>;
  uint32_t valid = 0;
#pragma unroll
  for (int j = 0; j < kPerLane<T>; ++j) {
    const int slot = part_slot<V>(j, lane);
    x[j] = -bit_cast<T>(static_cast<Key<T>>(KeyType<T>::kInfinity));
    if (slot >= first && slot < end) {
      x[j] = score_at<kInput>(row, formula, begin + slot);
      valid |= 1u << j;
    }
  }
  return valid;
}

// Scores of the part whose first slot is element `begin`; bit j of the result: x[j] exists.
template <TopkInput kInput, int V>
PIECE_OPS_DEVICE uint32_t load_part(const TopkRow& row, const TopkFormula& formula, int64_t begin,
                                    int lane, ScoreOf<kInput> (&x)[kPerLane<ScoreOf<kInput>>]) {
  if constexpr (kInput != TopkInput::kHash) {
    if (is_whole_part<kInput>(row, begin)) {
      float second[kSeconds<kInput>];
      load_inputs<kInput, V>(row, begin, lane, FromMemory{}, x, second);
      evaluate<kInput>(formula, second, x);
      return kAllOfPart<ScoreOf<kInput>>;
    }
  }
  return load_elements_of_part<kInput, V>(row, formula, begin, lane, x);
}

// Calls body(integral_constant<V>): the loads' width goes with the dtype of the tensor, so this
// branch is the same for a whole tile.
template <TopkInput kInput, class Body>
PIECE_OPS_DEVICE void with_width(const TopkRow& row, Body body) {
  if constexpr (kInput == TopkInput::kDouble) {
    body(std::integral_constant<int, 2>{});
  } else if constexpr (kInput == TopkInput::kOne) {
    if (static_cast<DType>(row.first_dtype) == DType::kFloat32) {
      body(std::integral_constant<int, 4>{});
    } else {
      body(std::integral_constant<int, 8>{});
    }
  } else {
    body(std::integral_constant<int, 4>{});
  }
}

// Which of these scores of this lane (bit j: the one in slot part_slot<V>(j, lane)) are excluded.
template <int V>
PIECE_OPS_DEVICE uint32_t excluded_bits(const Excluded& excluded, uint32_t bits, int64_t part_begin,
                                        int lane) {
  uint32_t found = 0;
  for (uint32_t rest = bits; rest != 0; rest &= rest - 1) {
    const int j = __ffs(static_cast<int>(rest)) - 1;
    if (excluded.has(part_begin + part_slot<V>(j, lane))) found |= 1u << j;
  }
  return found;
}

PIECE_OPS_DEVICE unsigned lanes_below(int lane) { return (1u << lane) - 1; }

}  // namespace piece_ops::cuda
