// sampled_weight_grad.cu - chosen entries of grad_output^T input, with the bits of the CPU.
//
// What       values[s] = sum over tokens t of grad_output[t, i] * input[t, j] in float32, in the
//            order of ops/sampled_weight_grad.h: a warp is the 32 lanes of a block of 256 tokens.
// Algorithm  for as many blocks of tokens as the scratch holds: 1. input is transposed into a panel
//            [column][block][256] of its own dtype, in which the 8 tokens of a lane (t = 32 m +
//            lane) lie side by side; 2. a thread block takes 64 consecutive indices and a block of
//            tokens; since indices are sorted they lie in few rows of the weight, whose 16
//            neighbouring columns of grad_output go to shared memory in the same layout, read once
//            by nearly nobody else; a warp takes an index: 16 bytes a lane from each side (a row of
//            the panel is 512 consecutive bytes, from L2), 8 products, 5 shuffles; 3. the blocks'
//            sums are added in order.
// Why        Gathering input[t, j] where it lies costs a 32-byte sector a product; transposed, a
//            sector serves 16. A panel of 32 MB stays in L2. Staging rows of input in shared memory
//            instead would save its way through L2, but a row of 14336 columns leaves room for 7
//            tokens, and random columns meet in the banks.
// Traffic    bfloat16, a product: 2 bytes of the panel from L2, 2 of shared memory. The matrices
//            are read once, input is written and read once more. Predicted on an H200 for all
//            Linears of Llama-8B, 8192 tokens, 0.1 %: 6.6e10 products, 131 GB from L2 at 5.5 TB/s
//            24 ms, and 86 GB at 4.0 TB/s 21 ms (less where the panel stays in L2): 45 ms, where
//            the dense GEMMs take 188 ms at 700 TFLOP/s. A product costs about as much as 130 of a
//            GEMM's, so that the GEMM is the better choice in rows from a density of about 0.8 %
//            (measured below: less); there backends/cuda_full_rows.py takes one, with other bits.
//            Measured on an H200, all in all: 4096 x 4096 0.26 ms (GEMM 0.33), 14336 x 4096 0.63 (1.17),
//            128256 x 4096 5.3 (11.2): half as fast as predicted.
// Scratch    512 bytes a column of input (1024 of float32) and 4 an index, for each block.
// Determinism  bitwise, any grid.
// Limits     indices were checked before. 2^31 thread blocks.
#include "element.h"
#include "piece_ops/ops/sampled_weight_grad.h"
#include "slots.h"

namespace piece_ops::cuda {

namespace {

constexpr int kBlock = static_cast<int>(kSampledBlock);
constexpr int kIndicesOfBlock = 64;
constexpr int kTileColumns = 16;
static_assert(kSampledLanes == kWarp && kBlock == kWarp * kVector, "a lane has one vector");

// Columns of a matrix as rows of a block of tokens: token 32 m + lane stands at lane * 8 + m. The
// rows are 16 bytes longer than a block, so that 8 of them lie in different banks.
template <class Bits>
struct alignas(16) Tile16 {
  Bits rows[kTileColumns][kBlock + 16 / sizeof(Bits)];
};

// ---- kernels ------------------------------------------------------------------------------------

// All threads of the block. data: the tile's first token and column; zeros where the matrix has no
// such token or column. A warp reads 8 columns of 4 tokens and writes 32 different banks.
template <class Bits>
__device__ __forceinline__ void load_tile(const Bits* data, int64_t row_stride, int tokens,
                                          int columns, Tile16<Bits>& tile) {
  const int thread_column = lane_of_warp() % 8;
  const int thread_step = lane_of_warp() / 8;
#pragma unroll 4
  for (int e = static_cast<int>(threadIdx.x) / kWarp; e < 4 * kWarp; e += kWarpsOfBlock) {
    const int lane = e % kWarp;
    const int m = e / kWarp % 2 * 4 + thread_step;
    const int column = e / kWarp / 2 * 8 + thread_column;
    const int t = m * kWarp + lane;
    Bits x = 0;
    if (t < tokens && column < columns) x = data[t * row_stride + column];
    tile.rows[column][lane * kVector + m] = x;
  }
}

// n, but no more than `most`, in 32 bits.
__device__ __forceinline__ int at_most(int64_t n, int most) {
  return n < most ? static_cast<int>(n) : most;
}

// Eight elements from a 16-byte boundary in shared or global memory.
__device__ __forceinline__ void read_vector(const uint16_t* p, uint16_t (&bits)[kVector]) {
  const uint4 words = *reinterpret_cast<const uint4*>(p);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits[2 * i] = static_cast<uint16_t>(word[i]);
    bits[2 * i + 1] = static_cast<uint16_t>(word[i] >> 16);
  }
}
__device__ __forceinline__ void read_vector(const uint32_t* p, uint32_t (&bits)[kVector]) {
  const uint4 low = reinterpret_cast<const uint4*>(p)[0];
  const uint4 high = reinterpret_cast<const uint4*>(p)[1];
  bits[0] = low.x, bits[1] = low.y, bits[2] = low.z, bits[3] = low.w;
  bits[4] = high.x, bits[5] = high.y, bits[6] = high.z, bits[7] = high.w;
}

// panel[column][block][256] of the tokens' blocks, padded with zeros.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const Bits* data, int64_t row_stride, int64_t tokens, int64_t columns,
                     int64_t blocks, Bits* panel) {
  __shared__ Tile16<Bits> tile;
  const int64_t block = blockIdx.x % blocks;
  const int64_t first = blockIdx.x / blocks * kTileColumns;
  load_tile(data + block * kBlock * row_stride + first, row_stride,
            at_most(tokens - block * kBlock, kBlock), at_most(columns - first, kTileColumns), tile);
  __syncthreads();  // the tile is complete
  constexpr int vectors = kBlock * static_cast<int>(sizeof(Bits)) / 16;
  for (int v = static_cast<int>(threadIdx.x); v < kTileColumns * vectors; v += kThreads) {
    const int row = v / vectors;
    if (first + row >= columns) break;
    const auto* from = reinterpret_cast<const uint4*>(tile.rows[row]);
    reinterpret_cast<uint4*>(panel + ((first + row) * blocks + block) * kBlock)[v % vectors] =
        from[v % vectors];
  }
}

// sums[block][s] of 64 indices and one block of tokens.
template <class G, class X>
__global__ void __launch_bounds__(kThreads)
    sampled_kernel(const typename G::Bits* grads, int64_t row_stride, int64_t tokens, int64_t out,
                   const typename X::Bits* panel, int64_t width, int64_t blocks,
                   const int64_t* indices, int64_t n, float* sums) {
  __shared__ Tile16<typename G::Bits> tile;
  __shared__ int64_t rows[kIndicesOfBlock];
  __shared__ int64_t columns[kIndicesOfBlock];
  const int lane = lane_of_warp();
  const int64_t block = blockIdx.x % blocks;
  const int64_t first = blockIdx.x / blocks * kIndicesOfBlock;
  const int count = at_most(n - first, kIndicesOfBlock);
  const int tokens_here = at_most(tokens - block * kBlock, kBlock);
  grads += block * kBlock * row_stride;
  panel += block * kBlock + lane * kVector;
  const int own = static_cast<int>(threadIdx.x);
  if (own < count) {
    const int64_t position = indices[first + own];
    rows[own] = position / width;
    columns[own] = position - rows[own] * width;
  }
  __syncthreads();  // rows and columns are complete
  for (int begin = 0; begin < count;) {
    const int64_t window = rows[begin] / kTileColumns * kTileColumns;
    // Rows increase: as many indices as are below the window's end come before it.
    const bool low = lane < count && rows[lane] < window + kTileColumns;
    const bool high = lane + kWarp < count && rows[lane + kWarp] < window + kTileColumns;
    const int end = __popc(__ballot_sync(kAllLanes, low)) + __popc(__ballot_sync(kAllLanes, high));
    load_tile(grads + window, row_stride, tokens_here, at_most(out - window, kTileColumns), tile);
    __syncthreads();  // the tile is complete
    for (int s = begin + own / kWarp; s < end; s += kWarpsOfBlock) {
      typename G::Bits g[kVector];
      typename X::Bits x[kVector];
      read_vector(panel + columns[s] * blocks * kBlock, x);
      read_vector(tile.rows[rows[s] - window] + lane * kVector, g);
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < kVector; ++m) sum = sum + G::widen(g[m]) * X::widen(x[m]);
#pragma unroll
      for (int half = kWarp / 2; half > 0; half /= 2) {
        sum = sum + __shfl_xor_sync(kAllLanes, sum, half);
      }
      if (lane == 0) sums[block * n + first + s] = sum;
    }
    begin = end;
    __syncthreads();  // all have read the tile before the next one overwrites it
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

// Tokens first .. first + tokens - 1, in `blocks` blocks.
template <class G, class X>
void run(const Context& context, const SampledWeightGradArgs& args, int64_t first, int64_t tokens,
         int64_t blocks, void* scratch) {
  using GBits = typename G::Bits;
  using XBits = typename X::Bits;
  const ConstMatrix& grads = args.grad_output;
  const ConstMatrix& input = args.input;
  const int64_t n = args.indices.n;
  XBits* const panel = static_cast<XBits*>(scratch);
  float* const sums =
      reinterpret_cast<float*>(static_cast<char*>(scratch) + blocks * panel_bytes(input));
  const cudaStream_t stream = stream_of(context);
  launch(transpose_kernel<XBits>, pieces(input.columns, kTileColumns) * blocks, kThreads, 0, stream,
         static_cast<const XBits*>(input.data) + first * input.row_stride, input.row_stride, tokens,
         input.columns, blocks, panel);
  launch(sampled_kernel<G, X>, pieces(n, kIndicesOfBlock) * blocks, kThreads, 0, stream,
         static_cast<const GBits*>(grads.data) + first * grads.row_stride, grads.row_stride, tokens,
         grads.columns, panel, input.columns, blocks, args.indices.data, n, sums);
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
  const int64_t most = blocks_at_once * kBlock;
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
