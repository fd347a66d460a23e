// select_topk_sparse.cu - the filter that reads what can matter: a maximum of every 32 is known.
//
// What       The same as select_topk_filter.cu, for tiles of 32768 elements with 1024 maxima.
// Algorithm  The score of an element cannot exceed the maximum of its chunk of 32. So with any
//            bound, only chunks whose maximum reaches the bound hold kept scores or ties; a chunk
//            with NaN has the maximum NaN and is read too. Reading fewer chunks never makes the
//            result wrong: the count verifies it as in the dense filter. A warp takes a tile:
//            1. 32 maxima a lane in registers; the chunks to read, in order, into a list in shared
//               memory.
//            2. each chunk is one load of the warp, eight in flight: counts what is above the bound
//               and what equals it; chunks with something above stay in the list.
//            3. one atomic add reserves room; these chunks are loaded again (L1, L2) and copied
//               out.
//            The bound is guessed from a sample of the scores, or proven by the digits of the
//            maxima: k chunks with a maximum of at least t are k scores of at least t (excluded
//            ones: k more of each). Mass ties, when most chunks reach the bound, cost one read of
//            everything.
// Traffic    read 4 bytes for each 32 scores, and 128 (float32) for each chunk that reaches the
//            bound; k = 0.1 %: 0.125 + 0.128 (1.2 k chunks: 0.15) bytes a score against 4; write as
//            the dense filter. Bound: HBM, scattered lines of 128 bytes, two thirds of the bus
//            assumed. H200, float32, k = 0.1 %: 1e9 0.08 ms, 8e9 0.65 ms (one read: 0.93 and 7.5).
// Scratch    as the dense filter, 12 bytes a tile of 32768.
// Determinism  as the dense filter.
// Limits     float32 maxima of the scores as select_topk evaluates them, one for 32 consecutive
//            elements of each tensor (the last one of what is left). Unchecked: that they are
//            right; one that is too small hides its chunk.
// Source     delegates: Gaihre et al., Dr. Top-k, SC'21; here the producer of the scores leaves
//            them.
#include "select_topk_load.h"
#include "select_topk_verify.h"

namespace piece_ops::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileChunks = kSparseSlots / kChunk;
static_assert(kTileChunks == kPartSlots<float>, "a warp holds a tile's maxima");
constexpr int kInFlight = 8;

// U elements of one input, one of each chunk, all loads before the first use.
template <int U>
PIECE_OPS_DEVICE void load_elements(const void* data, int32_t dtype, const int64_t (&at)[U],
                                    int64_t n, float (&x)[U]) {
  if (static_cast<DType>(dtype) == DType::kFloat32) {
#pragma unroll
    for (int u = 0; u < U; ++u) x[u] = at[u] < n ? static_cast<const float*>(data)[at[u]] : 0.0f;
    return;
  }
  uint32_t words[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    words[u] = at[u] < n ? static_cast<const uint16_t*>(data)[at[u]] : 0;
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    x[u] = static_cast<DType>(dtype) == DType::kBFloat16 ? bit_cast<float>(words[u] << 16)
                                                         : widen_fp16(words[u]);
  }
}

// Keys of this lane's element of U chunks; an element past the end, or of no chunk, has at = n.
template <TopkInput kInput, int U>
PIECE_OPS_DEVICE void chunk_keys(const TopkRow& row, const TopkFormula& formula,
                                 const int64_t (&at)[U], uint32_t (&keys)[U]) {
  float x[U];
  load_elements<U>(row.first, row.first_dtype, at, row.n, x);
  if constexpr (kInput == TopkInput::kTwo) {
    float second[U];
    load_elements<U>(row.second, row.second_dtype, at, row.n, second);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      x[u] = evaluate_score(formula.score, x[u], second[u], formula.constant);
    }
  } else if (formula.score == Score::kMagnitude) {
#pragma unroll
    for (int u = 0; u < U; ++u) x[u] = absolute(x[u]);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) keys[u] = to_key(x[u]);
}

template <TopkInput kInput>
__global__ void __launch_bounds__(kThreads, 5)
    sparse_filter_kernel(TopkTable table, TopkFormula formula, const TopkSearch<uint32_t>* search,
                         TopkFound<uint32_t> found) {
  __shared__ uint16_t lists[kWarps][kTileChunks];
  const int lane = threadIdx.x % kWarp;
  uint16_t* const list = lists[threadIdx.x / kWarp];
  if (table.is_broken()) return;  // all threads alike
  const uint32_t bound_key = search->bound();
  const float bound =
      from_key<float>(bound_key);  // NaN if no score has this key: all chunks are read
  const TopkFormula plain{Score::kPlain, 0.0f, 0};

  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
       tile < table.tiles; tile += stride) {
    const int64_t tensor = table.tile_tensors[tile];
    const TopkRow& row = table.rows[tensor];
    const int64_t begin = table.tile_begin(tile, tensor);
    const Excluded excluded = excluded_of(table, row, tile, tensor);

    // 1. the chunks to read
    TopkRow maxima{};
    maxima.first = row.maxima;
    maxima.n = (row.n + kChunk - 1) / kChunk;
    maxima.first_dtype = static_cast<int32_t>(DType::kFloat32);
    float m[32];
    const uint32_t valid = load_part<TopkInput::kOne, 4>(maxima, plain, begin / kChunk, lane, m);
    int chunks = 0;
    __syncwarp();  // the last tile's list has been read by all lanes
#pragma unroll
    for (int g = 0; g < 32; g += 4) {
      uint32_t mine = 0;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        mine |= static_cast<uint32_t>((valid >> (g + v) & 1u) && !(m[g + v] < bound)) << v;
      }
      if (!__any_sync(kAllLanes, mine != 0)) continue;
      int place = chunks;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const unsigned lanes = __ballot_sync(kAllLanes, mine >> v & 1u);
        place += __popc(lanes & lanes_below(lane));
        chunks += __popc(lanes);
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (mine >> v & 1u) list[place++] = static_cast<uint16_t>(part_slot<4>(g + v, lane));
      }
    }
    __syncwarp();  // the list is written

    // 2. count; the chunks with something above move to the list's front
    uint32_t kept = 0;
    uint32_t ties = 0;
    uint32_t nans = 0;
    int kept_chunks = 0;
    for (int c = 0; c < chunks; c += kInFlight) {
      int ids[kInFlight];
      int64_t at[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        ids[u] = c + u < chunks ? list[c + u] : -1;
        at[u] = ids[u] < 0 ? row.n : begin + ids[u] * kChunk + lane;
      }
      uint32_t keys[kInFlight];
      chunk_keys<kInput, kInFlight>(row, formula, at, keys);
      __syncwarp();  // all lanes have read the ids that may be overwritten now
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const bool exists = at[u] < row.n;
        bool above = exists && keys[u] > bound_key;
        if (above && excluded.any()) above = !excluded.has(at[u]);
        const unsigned lanes = __ballot_sync(kAllLanes, above);
        kept += static_cast<uint32_t>(__popc(lanes));
        ties +=
            static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, exists && keys[u] == bound_key)));
        nans += exists && keys[u] == 0;
        if (lanes == 0) continue;
        if (lane == 0) list[kept_chunks] = static_cast<uint16_t>(ids[u]);
        ++kept_chunks;
      }
    }
    __syncwarp();          // the shortened list is written
    if (excluded.any()) {  // a tie's chunk was read, since its maximum reaches the bound
      uint32_t excluded_ties = 0;
      for (int64_t e = excluded.begin + lane; e < excluded.end; e += kWarp) {
        excluded_ties += to_key(score_at<kInput>(row, formula, excluded.list[e])) == bound_key;
      }
      ties -= __reduce_add_sync(kAllLanes, excluded_ties);
    }
    if (found.nans != nullptr && __any_sync(kAllLanes, nans != 0)) {
      nans = __reduce_add_sync(kAllLanes, nans);
      if (lane == 0) {
        atomicAdd(found.nans + tensor, static_cast<unsigned long long>(nans));
        atomicMax(&found.state->first_nan, static_cast<unsigned long long>(table.count - tensor));
      }
    }

    // 3. room, and the copy
    unsigned long long start = 0;
    if (lane == 0) {
      if (kept) start = atomicAdd(&found.state->kept, static_cast<unsigned long long>(kept));
      if (ties) atomicAdd(&found.state->ties, static_cast<unsigned long long>(ties));
      found.starts[tile] = static_cast<int64_t>(start);
      found.counts[tile] = kept << 16 | ties;
    }
    start = __shfl_sync(kAllLanes, start, 0);
    if (!found.store || start + kept > static_cast<unsigned long long>(found.room)) continue;
    int64_t place = static_cast<int64_t>(start);
    for (int c = 0; c < kept_chunks; c += kInFlight) {
      int64_t at[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        at[u] = c + u < kept_chunks ? begin + list[c + u] * kChunk + lane : row.n;
      }
      uint32_t keys[kInFlight];
      chunk_keys<kInput, kInFlight>(row, formula, at, keys);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        bool above = at[u] < row.n && keys[u] > bound_key;
        if (above && excluded.any()) above = !excluded.has(at[u]);
        const unsigned lanes = __ballot_sync(kAllLanes, above);
        if (above) {
          const int64_t own = place + __popc(lanes & lanes_below(lane));
          found.keys[own] = keys[u];
          found.slots[own] = static_cast<uint16_t>(at[u] - begin);
        }
        place += __popc(lanes);
      }
    }
  }
  verify(search, found);
}

}  // namespace

void launch_sparse_filter(const TopkLaunch& to, const TopkTable& table,
                          const TopkSearch<uint32_t>* bound, const TopkFound<uint32_t>& found) {
  const int64_t blocks = (table.tiles + kWarps - 1) / kWarps;
  const int64_t most = int64_t{to.multiprocessors} * 5;
  const auto kernel = to.input == TopkInput::kTwo ? sparse_filter_kernel<TopkInput::kTwo>
                                                  : sparse_filter_kernel<TopkInput::kOne>;
  launch(kernel, blocks < most ? blocks : most, kThreads, 0, to.stream, table, to.formula, bound,
         found);
}

}  // namespace piece_ops::cuda
