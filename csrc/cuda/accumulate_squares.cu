// accumulate_squares.cu - adds the squares (and sums) of gradients to float32 accumulators, and, on
// request, leaves the largest score of every 32 elements for a selection that follows.
//
// What       square_sums += weight * (g * g), sums += weight * g, in float32 as written; a NaN or
//            infinite gradient anywhere in the call: nothing is added (docs/contracts.md).
// Algorithm  1. look_kernel reads the gradients and leaves the first tensor with a full exponent;
//            2. add_kernel reads that word: it adds, or, when there is one, counts the elements in
//            question of that tensor instead. No host in between, so both can be captured. One warp
//            takes tiles of 4096 elements, from the first element on at which every address is a
//            multiple of 16; where there is none (views cut at different offsets), one element a
//            lane, coalesced. The look-ahead is what "nothing is added" costs: an addition in
//            floating point cannot be taken back.
// Layout     The addition goes by groups of 128 elements, lane l having 4 l .. 4 l + 3: 16 bytes of
//            an accumulator, 8 of a 16-bit gradient, so that every load and store of a warp is one
//            run of whole 32-byte sectors. An iteration loads four groups (two with both
//            accumulators or maxima) before it stores the first: no load may pass a store.
//            All of it is streamed: beyond L2 nothing is found again, and a line to be evicted
//            first stays as long as L2 has room. It also makes every access one instruction on
//            global memory. The look loads 16 bytes a lane.
// Maxima     lanes 8 c .. 8 c + 7 hold chunk c of a group: three shuffles and one store of 4 bytes.
// Traffic    bfloat16, squares only: read 2 (look) + 2 + 4, write 4 = 12 bytes an element; with
//            sums 20; maxima 0.125 more. Bound: memory.
// Measured   H200, 2026-11-28, 1e9 elements: look 0.449 ms (4.45 TB/s). Addition, when a lane held
//            8 elements in a row and stored them as float4: squares 5.58 ms (1.79 TB/s), both 14.04
//            (1.28). nvcc had cut those stores into eight (both: 16) of 4 bytes, 32 bytes apart
//            between lanes, so each wrote an eighth of 32 sectors.
//            Of this layout: squares 2.53 ms (3.95 TB/s), both 4.57 (3.94); whole calls 3.24 and
//            5.25, squares of Llama-8B (8.03e9) 25.2. A copy of as many bytes: 4.2 TB/s.
// Scratch    the table and 16 bytes.  Determinism  bitwise, any grid: elements are independent.
// Limits     none on sizes or the number of tensors.
#include "element.h"
#include "piece_ops/ops/accumulate_squares.h"
#include "tiles.h"

namespace piece_ops::cuda {

namespace {

constexpr int64_t kTile = 4096;
constexpr int64_t kGroup = kWarp * kQuad;
constexpr int64_t kNone = 0x7f7f7f7f7f7f7f7f;  // what cudaMemsetAsync(0x7f) leaves: no tensor

constexpr int kGrad = 0;
constexpr int kSquares = 1;
constexpr int kSums = 2;
constexpr int kMaxima = 3;
constexpr int kSecond = 4;
constexpr int kCodes = 5;  // dtype of the grad | of second << 8 | elements before the vectors << 16
constexpr int kColumns = 6;
constexpr int64_t kNoVectors = 0xff;  // instead of that number: addresses never align together

// ---- the look -----------------------------------------------------------------------------------

template <class Element>
__device__ __forceinline__ bool is_not_finite(typename Element::Bits bits) {
  return (bits & Element::kFullExponent) == Element::kFullExponent;
}

// Of this lane's share of a tile: how many elements are not finite.
template <class Element>
__device__ __forceinline__ int64_t count_not_finite(const typename Element::Bits* grad, int64_t n) {
  using Bits = typename Element::Bits;
  const int lane = lane_of_warp();
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad) % 16 / sizeof(Bits));
  int64_t head = past == 0 ? 0 : static_cast<int64_t>(16 / sizeof(Bits)) - past;
  if (head > n) head = n;
  const int64_t vectors = (n - head) / kVector;
  int64_t count = 0;
  if (lane < head) count += is_not_finite<Element>(grad[lane]);
#pragma unroll 2
  for (int64_t vector = lane; vector < vectors; vector += kWarp) {
    Bits bits[kVector];
    load_vector(grad + head + vector * kVector, bits);
#pragma unroll
    for (int i = 0; i < kVector; ++i) count += is_not_finite<Element>(bits[i]);
  }
  const int64_t tail = head + vectors * kVector + lane;
  if (tail < n) count += is_not_finite<Element>(grad[tail]);
  return count;
}

__device__ __forceinline__ int64_t count_in_tile(const DeviceTable& table, const Tile& tile) {
  int64_t count = 0;
  const auto dtype = static_cast<DType>(table_word(table, kCodes, tile.tensor) & 0xff);
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using Bits = typename Element::Bits;
    const Bits* grad = table_pointer<const Bits>(table, kGrad, tile.tensor) + tile.begin;
    count = count_not_finite<Element>(grad, tile.n);
  });
  return count;
}

__global__ void __launch_bounds__(kThreads, 6)
    look_kernel(DeviceTable table, unsigned long long* report) {
  for_each_tile(table, kTile, [&](const Tile& tile) {
    if (count_in_tile(table, tile) != 0) {
      atomicMin(report, static_cast<unsigned long long>(tile.tensor));
    }
  });
}

// ---- the addition -------------------------------------------------------------------------------

struct Chunks {
  Score score;
  float constant;
};

// A key that orders like the score, NaN above everything: a NaN must not be lost.
constexpr uint32_t kNanKey = 0xffffffffu;
__device__ __forceinline__ uint32_t chunk_key(float score) {
  const uint32_t key = to_key(score);
  return key == 0 ? kNanKey : key;
}
__device__ __forceinline__ float chunk_maximum(uint32_t key) {
  return key == kNanKey ? bit_cast<float>(0x7fc00000u) : from_key<float>(key);
}
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

// Which of the accumulators is a formula's `first`, and is its `second` an accumulator too?
__device__ __forceinline__ bool first_is_square(Score score) {
  return score == Score::kPlain || score == Score::kTaylor;
}

template <bool kHasSquares, bool kHasSums, bool kHasMaxima>
struct Adder {
  // Groups in flight in a lane: with a bfloat16 gradient 96 bytes, 80 with two accumulators. That
  // of an SM's 1024 lanes is 3 times what its share of the bandwidth, 32 bytes a nanosecond, needs
  // to cover a microsecond.
  static constexpr int kGroups = (kHasSquares && kHasSums) || kHasMaxima ? 2 : 4;

  const DeviceTable& table;
  const Tile& tile;
  float weight;
  Chunks chunks;
  float* squares;  // of the tile's first element; likewise below
  float* sums;
  float* maxima;       // of the tile's first chunk
  const void* second;  // of the tensor's first element
  DType second_dtype;

  __device__ __forceinline__ void add(float g, float& square, float& sum) const {
    if (kHasSquares) square = square + weight * (g * g);
    if (kHasSums) sum = sum + weight * g;
  }

  __device__ __forceinline__ uint32_t key_of(int64_t i, float square, float sum) const {
    float other = square;
    if (second) other = load_float(second, second_dtype, tile.begin + i);
    // make_table refused the formulas whose accumulators are absent; leaving them out here as well
    // makes the binary a third smaller.
    const Score score = chunks.score;
    if (!kHasSums) return chunk_key(score == Score::kTaylor ? score_taylor(square, other) : square);
    if (!kHasSquares && score == Score::kPieceS) return 0;
    const float first = first_is_square(score) ? square : sum;
    return chunk_key(evaluate_score(score, first, other, chunks.constant));
  }

  // One element; its key, when maxima are wanted.
  template <class Element>
  __device__ __forceinline__ uint32_t add_one(const typename Element::Bits* grad, int64_t i) const {
    float square = kHasSquares ? __ldcs(squares + i) : 0.0f;
    float sum = kHasSums ? __ldcs(sums + i) : 0.0f;
    add(Element::widen(__ldcs(grad + i)), square, sum);
    if (kHasSquares) __stcs(squares + i, square);
    if (kHasSums) __stcs(sums + i, sum);
    return kHasMaxima ? key_of(i, square, sum) : 0;
  }

  // The chunk whose elements the 32 lanes hold, element begin + lane in lane `lane`.
  template <class Element>
  __device__ __forceinline__ void add_chunk(const typename Element::Bits* grad, int64_t begin,
                                            int64_t end) const {
    const int64_t i = begin + lane_of_warp();
    uint32_t key = i < end ? add_one<Element>(grad, i) : 0;
    if (kHasMaxima) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        key = larger(key, __shfl_xor_sync(kAllLanes, key, step));
      }
      if (lane_of_warp() == 0) maxima[begin / kMaximaChunk] = chunk_maximum(key);
    }
  }

  // kCount groups of 128 elements, this lane's four of each from i + 128 group on, below `end`. The
  // loads of all groups come before the first store, behind which no load may move.
  template <class Element, int kCount>
  __device__ __forceinline__ void add_groups(const typename Element::Bits* grad, int64_t i,
                                             int64_t end) const {
    typename Element::Bits bits[kCount][kQuad];
    float square[kCount][kQuad] = {};
    float sum[kCount][kQuad] = {};
    const bool is_inside = kCount > 1 || i < end;  // of several, the caller has whole ones only
    if (is_inside) {
#pragma unroll
      for (int group = 0; group < kCount; ++group) {
        const int64_t at = i + group * kGroup;
        load_quad(grad + at, bits[group]);
        if (kHasSquares) load_floats(squares + at, square[group]);
        if (kHasSums) load_floats(sums + at, sum[group]);
      }
    }
#pragma unroll
    for (int group = 0; group < kCount; ++group) {
      const int64_t at = i + group * kGroup;
      uint32_t key = 0;
      if (is_inside) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          add(Element::widen(bits[group][j]), square[group][j], sum[group][j]);
          if (kHasMaxima) key = larger(key, key_of(at + j, square[group][j], sum[group][j]));
        }
        if (kHasSquares) store_floats(squares + at, square[group]);
        if (kHasSums) store_floats(sums + at, sum[group]);
      }
      if (kHasMaxima) {
#pragma unroll
        for (int step = 1; step < kMaximaChunk / kQuad; step *= 2) {
          key = larger(key, __shfl_xor_sync(kAllLanes, key, step));
        }
        if (is_inside && lane_of_warp() % (kMaximaChunk / kQuad) == 0) {
          maxima[at / kMaximaChunk] = chunk_maximum(key);
        }
      }
    }
  }

  // head: elements before the first vector of the tile, or kNoVectors.
  template <class Element>
  __device__ __forceinline__ void run(const typename Element::Bits* grad, int64_t head) const {
    const int lane = lane_of_warp();
    // Chunks start at the tile, so with maxima vectors must too.
    if (head == kNoVectors || (kHasMaxima && head != 0)) {
      for (int64_t i = 0; i < tile.n; i += kWarp) add_chunk<Element>(grad, i, tile.n);
      return;
    }
    if (head > tile.n) head = tile.n;
    if (!kHasMaxima && lane < head) add_one<Element>(grad, lane);
    const int64_t whole = head + (tile.n - head) / kMaximaChunk * kMaximaChunk;
    int64_t first = head;
    for (; first + kGroups * kGroup <= whole; first += kGroups * kGroup) {
      add_groups<Element, kGroups>(grad, first + lane * kQuad, whole);
    }
    for (; first < whole; first += kGroup) {
      add_groups<Element, 1>(grad, first + lane * kQuad, whole);
    }
    if (whole < tile.n) add_chunk<Element>(grad, whole, tile.n);
  }
};

template <bool kHasSquares, bool kHasSums, bool kHasMaxima>
__global__ void __launch_bounds__(kThreads, kHasMaxima ? 3 : 4)
    add_kernel(DeviceTable table, float weight, Chunks chunks, unsigned long long* report,
               unsigned long long* sticky) {
  // Written by look_kernel, which has ended; the same for all threads.
  const auto bad = static_cast<int64_t>(report[0]);
  if (bad != kNone) {
    if (sticky && blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(sticky, 1ull);
    for_each_tile(table, kTile, [&](const Tile& tile) {
      if (tile.tensor != bad) return;
      const int64_t count = count_in_tile(table, tile);
      if (count != 0) atomicAdd(report + 1, static_cast<unsigned long long>(count));
    });
    return;
  }
  for_each_tile(table, kTile, [&](const Tile& tile) {
    const int64_t t = tile.tensor;
    const int64_t codes = table_word(table, kCodes, t);
    const Adder<kHasSquares, kHasSums, kHasMaxima> adder{
        table,
        tile,
        weight,
        chunks,
        kHasSquares ? table_pointer<float>(table, kSquares, t) + tile.begin : nullptr,
        kHasSums ? table_pointer<float>(table, kSums, t) + tile.begin : nullptr,
        kHasMaxima ? table_pointer<float>(table, kMaxima, t) + tile.begin / kMaximaChunk : nullptr,
        kHasMaxima ? table_pointer<const void>(table, kSecond, t) : nullptr,
        static_cast<DType>((codes >> 8) & 0xff)};
    with_element(static_cast<DType>(codes & 0xff), [&](auto element) {
      using Element = decltype(element);
      using Bits = typename Element::Bits;
      const Bits* grad = table_pointer<const Bits>(table, kGrad, t) + tile.begin;
      adder.template run<Element>(grad, codes >> 16);
    });
  });
}

// ---- launcher -----------------------------------------------------------------------------------

// Elements before the first one at which all addresses are multiples of 16. A tile has a multiple
// of 8 elements, so this holds for every tile of the tensor.
int64_t elements_before_vectors(const AccumulateSquaresArgs& args, int64_t t) {
  const ConstView& grad = args.grads[t];
  for (int64_t head = 0; head < kVector; ++head) {
    const int64_t floats = head * static_cast<int64_t>(sizeof(float));
    bool fits = (address_word(grad.data) + head * size_of(grad.dtype)) % 16 == 0;
    if (args.square_sums) fits &= (address_word(args.square_sums[t]) + floats) % 16 == 0;
    if (args.sums) fits &= (address_word(args.sums[t]) + floats) % 16 == 0;
    if (fits) return head;
  }
  return kNoVectors;
}

template <bool kHasSquares, bool kHasSums>
void launch_add(const Context& context, const DeviceTable& table, float weight,
                const ChunkMaxima& maxima, unsigned long long* report, unsigned long long* sticky) {
  const Chunks chunks{maxima.score, maxima.constant};
  if (maxima.maxima) {
    launch_over_tiles(add_kernel<kHasSquares, kHasSums, true>, context, table, weight, chunks,
                      report, sticky);
  } else {
    launch_over_tiles(add_kernel<kHasSquares, kHasSums, false>, context, table, weight, chunks,
                      report, sticky);
  }
}

}  // namespace

Table make_table(const AccumulateSquaresArgs& args, const ChunkMaxima& maxima) {
  const Score score = maxima.score;
  const bool needs_squares =
      score == Score::kPlain || score == Score::kTaylor || score == Score::kPieceS;
  const bool needs_sums = score != Score::kPlain && score != Score::kTaylor;
  const bool needs_second = score_needs_second(score) && score != Score::kPieceS;
  PIECE_OPS_CHECK(
      !maxima.maxima || (score != Score::kRandom && (!needs_squares || args.square_sums) &&
                         (!needs_sums || args.sums) && (!needs_second || maxima.second)),
      "piece_ops.accumulate_squares_: maxima of score ", static_cast<int>(score),
      " need accumulators or a second statistic that were not given");
  return build_table(
      args.count, kTile, kColumns, [&](int64_t t) { return args.grads[t].n; },
      [&](int column, int64_t t) -> int64_t {
        const bool has_second = maxima.maxima && needs_second;
        switch (column) {
          case kGrad:
            return address_word(args.grads[t].data);
          case kSquares:
            return args.square_sums ? address_word(args.square_sums[t]) : 0;
          case kSums:
            return args.sums ? address_word(args.sums[t]) : 0;
          case kMaxima:
            return maxima.maxima ? address_word(maxima.maxima[t]) : 0;
          case kSecond:
            return has_second ? address_word(maxima.second[t].data) : 0;
          default:
            return static_cast<int64_t>(args.grads[t].dtype) |
                   (has_second ? static_cast<int64_t>(maxima.second[t].dtype) << 8 : 0) |
                   elements_before_vectors(args, t) << 16;
        }
      });
}

void accumulate_squares(const Context& context, const DeviceTable& table, bool has_square_sums,
                        bool has_sums, float weight, const ChunkMaxima& maxima, int64_t* report,
                        int64_t* sticky) {
  use_device(context);
  auto* words = reinterpret_cast<unsigned long long*>(report);
  auto* counter = reinterpret_cast<unsigned long long*>(sticky);
  PIECE_OPS_CUDA_CHECK(cudaMemsetAsync(report, 0x7f, sizeof(int64_t), stream_of(context)));
  PIECE_OPS_CUDA_CHECK(cudaMemsetAsync(report + 1, 0, sizeof(int64_t), stream_of(context)));
  launch_over_tiles(look_kernel, context, table, words);
  if (has_square_sums && has_sums) {
    launch_add<true, true>(context, table, weight, maxima, words, counter);
  } else if (has_square_sums) {
    launch_add<true, false>(context, table, weight, maxima, words, counter);
  } else {
    launch_add<false, true>(context, table, weight, maxima, words, counter);
  }
}

}  // namespace piece_ops::cuda
