// sampled_weight_grad.cu - chosen entries of grad_output^T input, with the bits of the CPU.
//
// What       values[s] = sum over tokens t of grad_output[t, i] * input[t, j] in float32, in the
//            order of ops/sampled_weight_grad.h: a warp is the 32 lanes of a block of 256 tokens.
// Algorithm  for as many blocks of tokens as the scratch holds: 1. input is transposed into a panel
//            [block][column][256] of its own dtype, in which the 8 tokens of a lane (t = 32 m +
//            lane) are one word of 16 bytes (two of float32); 2. a thread block takes a block of
//            tokens and a chunk of up to 256 consecutive indices. Since indices are sorted they lie
//            in few windows of 64 bytes of grad_output's columns, which go to shared memory in the
//            same layout, one after another; chunks end between windows where they can. A warp
//            takes four indices: a word a lane from the tile and one from the panel (512
//            consecutive bytes, from L2) each, 8 products, and one tree of 6 shuffles for all
//            four; 3. the blocks' sums are added in order.
// Why        Gathering input[t, j] where it lies costs a 32-byte sector a product; transposed, a
//            sector serves 16. Neighbouring thread blocks share a block of tokens, so that the
//            part of the panel in use (2 MB of 4096 columns) stays in L2. Staging rows of input in
//            shared memory instead would save its way through L2, but a row of 14336 columns
//            leaves room for 7 tokens, and random columns meet in the banks.
// Instructions  of warps, counted in SASS for sm_90, bfloat16: 1600 a thread block (195 a warp: two
//            indices a thread, their rows by division), 990 a window (124 a warp: 4 loads of 16
//            bytes, 16 byte permutations, 8 stores, addresses), 47 an index (188 for four), 1730 a
//            tile of the transposition. 14336 x 4096, 8192 tokens: 122 million, 61 an index in the
//            kernel; 0.13 ms if a processor issues 4 in each cycle of 1.75 GHz, less than L2 takes.
//            The kernel before it took 4800 for a tile of half the width (loads of 2 bytes, 37 each
//            with address and predicate), loaded most tiles twice, and 70 an index: 253 an index in
//            the kernel, 520 million with the transposition, 0.56 of the 0.63 ms an H200 took.
// Traffic    bfloat16, 8192 tokens. grad_output and input are read once (4.3 TB/s), the panel goes
//            to L2 and every index reads a row of it (2 bytes a product, 5.5 TB/s), and a step (32
//            MB of scratch) has three launches of 2.5 us. Predicted on an H200 at 0.1 %, ms:
//                              matrices   L2     launches      in all   GEMM   old kernel
//              4096 x 4096     0.031      0.062  3 x 0.0075    0.12     0.33   0.26
//              14336 x 4096    0.070      0.187  3 x 0.0075    0.28     1.17   0.63
//              4096 x 14336    0.070      0.218  8 x 0.0075    0.35     1.22   0.83
//              128256 x 4096   0.504      1.577  5 x 0.0075    2.1      11.2   5.3
//            GEMM and old kernel as measured on an H200. All Linears of Llama-8B: 43 ms, where the
//            GEMMs take 188 ms at 700 TFLOP/s. 512 tokens: one step; 0.02 to 0.03 ms for these.
//            Rows of which much is wanted are better multiplied whole, with other bits:
//            backends/cuda_full_rows.py.
// Scratch    512 bytes a column of input (1024 of float32) and 4 an index, for each block.
// Determinism  bitwise, any grid.
// Limits     indices were checked before. 2^31 thread blocks. Vectors of 16 bytes where rows begin
//            at a multiple of 16, single elements where they do not or end within a vector.
//
// This kernel was compiled for four architectures and emulated, not yet run on a GPU.
#include "element.h"
#include "piece_ops/ops/sampled_weight_grad.h"
#include "slots.h"

namespace piece_ops::cuda {

namespace {

constexpr int kBlock = static_cast<int>(kSampledBlock);
static_assert(kSampledLanes == kWarp && kBlock == kWarp * kVector, "a lane has one vector");
constexpr int kTogether = 4;  // indices that a warp takes at once
constexpr int kMostOfChunk = kThreads;
constexpr int kLeastOfChunk = 16;
constexpr int kResident = 4;  // thread blocks that a processor holds of 16-bit factors

// 64 bytes of columns of a matrix as rows of a block of tokens, token 32 m + lane. Of 16-bit
// elements a lane has one word of 16 bytes (m = 0 .. 7), of 32-bit ones two (m = 0 .. 3 at `lane`,
// m = 4 .. 7 at 32 + lane).
template <class Bits>
struct Layout {
  static constexpr int kColumnsOfVector = 16 / static_cast<int>(sizeof(Bits));
  static constexpr int kColumns = 4 * kColumnsOfVector;
  static constexpr int kWords = kBlock / kColumnsOfVector;  // of a row
  static constexpr int kWordsOfLane = kWords / kWarp;
  static constexpr int kRowBytes = 16 * kWords;
};
template <class Bits>
struct Tile64 {
  uint4 words[Layout<Bits>::kColumns * Layout<Bits>::kWords];
};

// Where in a tile a row's word stands: among its eight neighbours in other places for each vector
// of columns, so that what a warp stores of two lanes and four vectors lies in different banks, as
// does what it reads of a row.
template <class Bits>
__device__ __forceinline__ int place_in_tile(int row, int word) {
  return row * Layout<Bits>::kWords + (word ^ (row / Layout<Bits>::kColumnsOfVector * 2));
}

// n, but no more than `most`, in 32 bits.
__device__ __forceinline__ int at_most(int64_t n, int most) {
  return n < most ? static_cast<int>(n) : most;
}

// ---- kernels ------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t part(const uint4& word, int i) {
  return i == 0 ? word.x : i == 1 ? word.y : i == 2 ? word.z : word.w;
}

// The first `columns` elements of a vector, zeros after them.
template <class Bits>
__device__ __forceinline__ uint4 load_one_by_one(const Bits* p, int columns) {
  constexpr int kOfPart = 4 / static_cast<int>(sizeof(Bits));
  uint32_t parts[4] = {};
#pragma unroll
  for (int i = 0; i < Layout<Bits>::kColumnsOfVector; ++i) {
    if (i < columns) parts[i / kOfPart] |= uint32_t{p[i]} << (i % kOfPart * 16);
  }
  return make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

// Four tokens' vectors of the same columns, m = 4 half .. 4 half + 3 of one lane, to these columns'
// rows. words: where the lane's stand in the first row.
__device__ __forceinline__ void store_turned(const uint4 (&v)[4], int half, uint4* words,
                                             uint16_t) {
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    uint32_t pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pair[i] = __byte_perm(part(v[2 * i], c / 2), part(v[2 * i + 1], c / 2),
                            c % 2 == 0 ? 0x5410 : 0x7632);
    }
    reinterpret_cast<uint2*>(words + c * Layout<uint16_t>::kWords)[half] =
        make_uint2(pair[0], pair[1]);
  }
}
__device__ __forceinline__ void store_turned(const uint4 (&v)[4], int half, uint4* words,
                                             uint32_t) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    words[c * Layout<uint32_t>::kWords + half * kWarp] =
        make_uint4(part(v[0], c), part(v[1], c), part(v[2], c), part(v[3], c));
  }
}

// What a thread moves of a tile: four vectors of the same columns, of tokens 32 apart.
struct Share {
  uintptr_t address;  // in the matrix, if the tile begins at its first column
  int column;
  int tokens;  // what is left of the block's tokens from the first one on
  int half;
  uint4* words;  // in the tile
};
template <class Bits>
__device__ __forceinline__ Share share_of_thread(const Bits* data, int64_t row_stride, int tokens,
                                                 Tile64<Bits>& tile) {
  const unsigned own = threadIdx.x;
  const int lane = static_cast<int>(own / 4 % 2 + own / 16 * 2);
  const int half = static_cast<int>(own / 8 % 2);
  const int first = half * 4 * kWarp + lane;
  const int column = static_cast<int>(own % 4) * Layout<Bits>::kColumnsOfVector;
  return {reinterpret_cast<uintptr_t>(data + first * row_stride + column), column, tokens - first,
          half, tile.words + place_in_tile<Bits>(column, lane)};
}

// All threads of the block. first: the tile's first column, from which there are so many columns;
// zeros where the matrix has no such token or column. aligned: rows begin at 16 bytes.
template <class Bits>
__device__ __forceinline__ void load_tile(const Share& share, int64_t row_stride, bool aligned,
                                          int64_t first, int columns) {
  constexpr int kBytes = static_cast<int>(sizeof(Bits));
  const uintptr_t address = share.address + static_cast<uint64_t>(first) * kBytes;
  const uint64_t step = static_cast<uint64_t>(row_stride) * (kWarp * kBytes);
  const int left = columns - share.column;
  uint4 v[4];
  if (aligned && left >= Layout<Bits>::kColumnsOfVector) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      v[m] = make_uint4(0, 0, 0, 0);
      if (m * kWarp < share.tokens) {
        v[m] = __ldcs(reinterpret_cast<const uint4*>(address + m * step));
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      v[m] = load_one_by_one(reinterpret_cast<const Bits*>(address + m * step),
                             m * kWarp < share.tokens ? left : 0);
    }
  }
  store_turned(v, share.half, share.words, Bits{});
}

// A lane's element m.
__device__ __forceinline__ uint16_t element(const uint4 (&words)[1], int m) {
  return static_cast<uint16_t>(part(words[0], m / 2) >> (m % 2 * 16));
}
__device__ __forceinline__ uint32_t element(const uint4 (&words)[2], int m) {
  return part(words[m / 4], m % 4);
}

// panel[block][column][words of a row] of the tokens' blocks, padded with zeros.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const Bits* data, int64_t row_stride, bool aligned, int64_t tokens,
                     int64_t columns, unsigned tiles, uint4* panel) {
  constexpr int kWords = Layout<Bits>::kWords;
  __shared__ Tile64<Bits> tile;
  const int64_t block = blockIdx.x / tiles;
  const int64_t first = int64_t{blockIdx.x % tiles} * Layout<Bits>::kColumns;
  const int here = at_most(columns - first, Layout<Bits>::kColumns);
  const Share share = share_of_thread(data + block * kBlock * row_stride, row_stride,
                                      at_most(tokens - block * kBlock, kBlock), tile);
  load_tile<Bits>(share, row_stride, aligned, first, here);
  __syncthreads();  // the tile is complete
  panel += (block * columns + first) * kWords;
#pragma unroll
  for (int i = 0; i < Layout<Bits>::kColumns * kWords / kThreads; ++i) {
    const int word = static_cast<int>(threadIdx.x) + i * kThreads;
    if (word < here * kWords) {
      panel[word] = tile.words[place_in_tile<Bits>(word / kWords, word % kWords)];
    }
  }
}

// What a warp needs to know of an index.
struct Product {
  uint32_t column;  // of the panel
  uint32_t place;   // of its row in the tile, in bytes; the lane's word stands at ^ 16 lane
};

// From the lanes' parts of four sums, the sum number lane / 8. The additions are those of one sum
// after another: where two lanes would add the same two numbers for two sums, each does one sum.
__device__ __forceinline__ float add_lanes(float (&sums)[kTogether], int lane) {
#pragma unroll
  for (int half = kWarp / 2; half >= kWarp / kTogether; half /= 2) {
    const int left = half * kTogether / kWarp;  // sums of a lane from now on
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int u = 0; u < left; ++u) {
      const float given = upper ? sums[u] : sums[u + left];
      const float kept = upper ? sums[u + left] : sums[u];
      sums[u] = kept + __shfl_xor_sync(kAllLanes, given, half);
    }
  }
#pragma unroll
  for (int half = kWarp / kTogether / 2; half > 0; half /= 2) {
    sums[0] = sums[0] + __shfl_xor_sync(kAllLanes, sums[0], half);
  }
  return sums[0];
}

// sums[block][s] of a chunk of indices and one block of tokens. So that a window of grad_output's
// columns is seldom loaded twice, indices at the beginning of a chunk that share the last window of
// the chunk before are left to its thread block, unless they are the whole chunk.
template <class G, class X>
__global__ void __launch_bounds__(kThreads, sizeof(typename G::Bits) + sizeof(typename X::Bits) == 4
                                                ? kResident
                                                : kResident / 2)
    sampled_kernel(const typename G::Bits* grads, int64_t row_stride, bool aligned, int64_t tokens,
                   int64_t out, const uint4* panel, int64_t panel_bytes, uint64_t width,
                   const int64_t* indices, int64_t n, int chunk, unsigned chunks, float* sums) {
  using Grads = Layout<typename G::Bits>;
  using Panel = Layout<typename X::Bits>;
  constexpr int kNone = 0x7fffffff;
  __shared__ Tile64<typename G::Bits> tile;
  __shared__ Product products[2 * kMostOfChunk + kTogether];
  __shared__ int windows[2 * kMostOfChunk];
  __shared__ int window_before;
  const int own = static_cast<int>(threadIdx.x);
  const int lane = lane_of_warp();
  const int64_t block = blockIdx.x / chunks;
  const int64_t first = int64_t{blockIdx.x % chunks} * chunk;
  const int here = at_most(n - first, 2 * chunk);  // of this chunk and the next one
  const int of_chunk = here < chunk ? here : chunk;
  int own_windows[2] = {kNone, kNone};
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const int s = own + u * chunk;
    if (own < chunk && s < here) {
      const uint64_t position = static_cast<uint64_t>(indices[first + s]);
      const uint64_t row = position / width;
      own_windows[u] = static_cast<int>(row / Grads::kColumns);
      windows[s] = own_windows[u];
      const int place = place_in_tile<typename G::Bits>(static_cast<int>(row % Grads::kColumns), 0);
      products[s] = {static_cast<uint32_t>(position - row * width),
                     16 * static_cast<uint32_t>(place)};
    }
  }
  // The last warp reads past the end, and stores nothing of it.
  if (own < kTogether) products[here + own] = {0, 0};
  if (own == 0) {
    const uint64_t before = first == 0 ? 0 : static_cast<uint64_t>(indices[first - 1]) / width;
    window_before = first == 0 ? -1 : static_cast<int>(before / Grads::kColumns);
  }
  __syncthreads();  // windows and products are complete
  const int left = __syncthreads_count(own_windows[0] <= window_before);
  const int more = __syncthreads_count(own_windows[1] <= windows[of_chunk - 1]);
  const int end = of_chunk + (more == here - of_chunk ? 0 : more);
  const uintptr_t own_panel =
      reinterpret_cast<uintptr_t>(panel) + static_cast<uint64_t>(block * panel_bytes + 16 * lane);
  const Share share = share_of_thread(grads + block * kBlock * row_stride, row_stride,
                                      at_most(tokens - block * kBlock, kBlock), tile);
  sums += block * n + first;
  for (int begin = left == of_chunk ? 0 : left; begin < end;) {
    const int window = windows[begin];
    // Windows never decrease. Here all have read the tile, before the next one overwrites it.
    const int until = __syncthreads_count(own_windows[0] <= window) +
                      __syncthreads_count(own_windows[1] <= window);
    const int stop = until < end ? until : end;
    const int64_t column = int64_t{window} * Grads::kColumns;
    load_tile<typename G::Bits>(share, row_stride, aligned, column,
                                at_most(out - column, Grads::kColumns));
    __syncthreads();  // the tile is complete
    for (int s = begin + own / kWarp * kTogether; s < stop; s += kWarpsOfBlock * kTogether) {
      float parts[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const Product product = products[s + u];
        const auto* const row =
            reinterpret_cast<const uint4*>(own_panel + uint64_t{product.column} * Panel::kRowBytes);
        const auto* const place =
            reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(tile.words) +
                                           (product.place ^ (16 * static_cast<uint32_t>(lane))));
        uint4 x[Panel::kWordsOfLane];
        uint4 g[Grads::kWordsOfLane];
#pragma unroll
        for (int i = 0; i < Panel::kWordsOfLane; ++i) x[i] = __ldg(row + i * kWarp);
#pragma unroll
        for (int i = 0; i < Grads::kWordsOfLane; ++i) g[i] = place[i * kWarp];
        parts[u] = 0.0f;
#pragma unroll
        for (int m = 0; m < kVector; ++m) {
          parts[u] = parts[u] + G::widen(element(g, m)) * X::widen(element(x, m));
        }
      }
      const float sum = add_lanes(parts, lane);
      const int slot = s + lane * kTogether / kWarp;
      if (lane % (kWarp / kTogether) == 0 && slot < stop) sums[slot] = sum;
    }
    begin = stop;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_blocks_kernel(const float* sums, int64_t blocks, int64_t n, bool is_first, float* values) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s >= n) return;
  float value = is_first ? 0.0f : values[s];
  for (int64_t block = 0; block < blocks; ++block) value = value + sums[block * n + s];
  values[s] = value;
}

// ---- launcher -----------------------------------------------------------------------------------

template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Float32{});
    case DType::kBFloat16:
      return body(BFloat16{});
    default:
      return body(Float16{});
  }
}

int64_t panel_bytes(const ConstMatrix& input) {
  return input.columns * kBlock * size_of(input.dtype);
}

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Whether all rows begin at a multiple of 16 bytes.
bool is_aligned(const ConstMatrix& matrix) {
  return address_word(matrix.data) % 16 == 0 && matrix.row_stride * size_of(matrix.dtype) % 16 == 0;
}

// Indices that a thread block takes: fewer where there are few, so that all processors have work.
int chunk_of(const Context& context, int64_t n, int64_t blocks) {
  int processors = 0;
  PIECE_OPS_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, context.device));
  int chunk = kMostOfChunk;
  while (chunk > kLeastOfChunk && pieces(n, chunk) * blocks < kResident * processors) chunk /= 2;
  return chunk;
}

// Tokens first .. first + tokens - 1, in `blocks` blocks. Neighbouring thread blocks have the same
// block of tokens: a part of the panel that stays in L2 whatever its size.
template <class G, class X>
void run(const Context& context, const SampledWeightGradArgs& args, int64_t first, int64_t tokens,
         int64_t blocks, void* scratch) {
  using GBits = typename G::Bits;
  using XBits = typename X::Bits;
  const ConstMatrix& grads = args.grad_output;
  const ConstMatrix& input = args.input;
  const int64_t n = args.indices.n;
  uint4* const panel = static_cast<uint4*>(scratch);
  float* const sums =
      reinterpret_cast<float*>(static_cast<char*>(scratch) + blocks * panel_bytes(input));
  const cudaStream_t stream = stream_of(context);
  const int64_t tiles = pieces(input.columns, Layout<XBits>::kColumns);
  const int chunk = chunk_of(context, n, blocks);
  const int64_t chunks = pieces(n, chunk);
  launch(transpose_kernel<XBits>, tiles * blocks, kThreads, 0, stream,
         static_cast<const XBits*>(input.data) + first * input.row_stride, input.row_stride,
         is_aligned(input), tokens, input.columns, static_cast<unsigned>(tiles), panel);
  launch(sampled_kernel<G, X>, chunks * blocks, kThreads, 0, stream,
         static_cast<const GBits*>(grads.data) + first * grads.row_stride, grads.row_stride,
         is_aligned(grads), tokens, grads.columns, panel, panel_bytes(input),
         static_cast<uint64_t>(input.columns), args.indices.data, n, chunk,
         static_cast<unsigned>(chunks), sums);
  launch(add_blocks_kernel, pieces(n, kThreads), kThreads, 0, stream, sums, blocks, n, first == 0,
         args.values);
}

}  // namespace

Table make_table(const SampledWeightGradArgs& args) {
  return build_table(
      1, kSlotTile, kFirstOwnColumn, [&](int64_t) { return args.indices.n; },
      [&](int column, int64_t) {
        return column == kIndices ? address_word(args.indices.data)
                                  : args.grad_output.columns * args.input.columns;
      });
}

int64_t sampled_weight_grad_bytes(const SampledWeightGradArgs& args) {
  return pieces(panel_bytes(args.input) + 4 * args.indices.n, 16) * 16;
}

void sampled_weight_grad(const Context& context, const SampledWeightGradArgs& args, void* scratch,
                         int64_t blocks_at_once) {
  PIECE_OPS_CHECK(blocks_at_once > 0, "piece_ops: blocks_at_once must be positive");
  use_device(context);
  // As few steps as there must be, all of about the same length.
  const int64_t blocks = pieces(args.input.rows, kBlock);
  const int64_t steps = pieces(blocks, blocks_at_once);
  const int64_t most = steps == 0 ? 1 : pieces(blocks, steps) * kBlock;
  for (int64_t first = 0; first < args.input.rows && args.indices.n > 0; first += most) {
    const int64_t tokens = std::min(most, args.input.rows - first);
    with_type(args.grad_output.dtype, [&](auto g) {
      with_type(args.input.dtype, [&](auto x) {
        run<decltype(g), decltype(x)>(context, args, first, tokens, pieces(tokens, kBlock),
                                      scratch);
      });
    });
  }
}

}  // namespace piece_ops::cuda
