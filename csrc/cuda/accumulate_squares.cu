// accumulate_squares.cu - adds the squares (and sums) of gradients to float32 accumulators, and, on
// request, leaves the largest score of every 32 elements for a selection that follows.
//
// What       square_sums += weight * (g * g), sums += weight * g, in float32 as written; a NaN or
//            infinite gradient anywhere in the call: nothing is added (docs/contracts.md).
// Algorithm  1. look_kernel reads the gradients and leaves the first tensor with a full exponent;
//            2. add_kernel reads that word: it adds, or, when there is one, counts the elements in
//            question of that tensor instead. No host in between, so both can be captured. One warp
//            takes tiles of 4096 elements; a lane handles 8 at a time in 16-byte accesses, from the
//            first element on at which every address is a multiple of 16; where there is none
//            (views cut at different offsets), one element a lane, coalesced. The look-ahead is
//            what "nothing is added" costs: an addition in floating point cannot be taken back.
// Maxima     lanes 4 c .. 4 c + 3 hold chunk c of 32 elements: two shuffles and one store of 4
//            bytes.
// Traffic    bfloat16, squares only: read 2 (look) + 2 + 4, write 4 = 12 bytes an element; with
//            sums 20; maxima 0.125 more. Bound: memory. Predicted on an H200 (look 4.3 TB/s, add
//            4.0): 1e9 elements 3.0 ms, Llama-8B (8.03e9) 24 ms; gradients that fit in the 50 MB L2
//            are read from memory once.
// Scratch    the table and 16 bytes.  Determinism  bitwise, any grid: elements are independent.
// Limits     none on sizes or the number of tensors.
#include "element.h"
#include "piece_ops/ops/accumulate_squares.h"
#include "tiles.h"

namespace piece_ops::cuda {

namespace {

constexpr int64_t kTile = 4096;
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
    float square = kHasSquares ? squares[i] : 0.0f;
    float sum = kHasSums ? sums[i] : 0.0f;
    add(Element::widen(grad[i]), square, sum);
    if (kHasSquares) squares[i] = square;
    if (kHasSums) sums[i] = sum;
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

  // Eight elements from i on, all addresses multiples of 16.
  template <class Element>
  __device__ __forceinline__ uint32_t add_vector(const typename Element::Bits* grad,
                                                 int64_t i) const {
    typename Element::Bits bits[kVector];
    float square[kVector] = {};
    float sum[kVector] = {};
    load_vector(grad + i, bits);
    if (kHasSquares) load_floats(squares + i, square);
    if (kHasSums) load_floats(sums + i, sum);
    uint32_t key = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      add(Element::widen(bits[j]), square[j], sum[j]);
      if (kHasMaxima) key = larger(key, key_of(i + j, square[j], sum[j]));
    }
    if (kHasSquares) store_floats(squares + i, square);
    if (kHasSums) store_floats(sums + i, sum);
    return key;
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
    for (int64_t first = head; first < whole; first += kWarp * kVector) {
      const int64_t i = first + lane * kVector;
      uint32_t key = i < whole ? add_vector<Element>(grad, i) : 0;
      if (kHasMaxima) {
        key = larger(key, __shfl_xor_sync(kAllLanes, key, 1));
        key = larger(key, __shfl_xor_sync(kAllLanes, key, 2));
        if (i < whole && lane % 4 == 0) maxima[i / kMaximaChunk] = chunk_maximum(key);
      }
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
