// bodies.inl - the inner loops, once; <isa>.cpp includes it after its primitives (not_less_mask,
// equal_mask, widen_fp16; FloatLanes and the tile of products; Wide and its loads, store and
// transpose), with PIECE_OPS_ISA_NAMESPACE set.
//
// Everything lives in the namespace of the instruction set or is always inlined, and no std
// template is used: nothing here may be merged by the linker with a copy built for another one.
// The loops are plain; with -O3 and the file's flags the compiler vectorises them, and with
// -ffp-contract=off every instruction set gives the same bits.

#include "product_tile.inl"

namespace piece_ops::cpu::PIECE_OPS_ISA_NAMESPACE {
namespace {

// How far ahead of a streaming loop memory is asked for. The hardware prefetcher stops at every
// 4 KiB page, and a mispredicted branch (one in ten groups of the scan) empties the queue of loads:
// two pages ahead the scan of 1e8 floats went from 14.1 to 11.4 ms (Zen 5, one thread).
constexpr int64_t kPrefetchBytes = 8192;

// Asks for the 64 * size bytes that lie kPrefetchBytes after x; past the end of memory is harmless.
template <class T>
inline __attribute__((always_inline)) void prefetch_ahead(const T* x) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(x) + kPrefetchBytes;
  for (uintptr_t line = 0; line < 64 * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
  }
}

// ---- element types -----------------------------------------------------------------------------

void to_float(DType dtype, const void* x, float* __restrict out, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(x);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(half[i]);
  } else {
    widen_fp16(half, out, n);
  }
}

// An exponent of all ones is infinity or NaN.
template <class Bits>
int64_t count_exponent_full(const Bits* x, int64_t n, Bits exponent) {
  Bits any = 0;
  for (int64_t i = 0; i < n; ++i) {
    any |= static_cast<Bits>((x[i] & exponent) == exponent ? 1 : 0);
  }
  if (!any) return 0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += (x[i] & exponent) == exponent;
  return count;
}

int64_t count_nonfinite(DType dtype, const void* x, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return count_exponent_full(static_cast<const uint32_t*>(x), n, uint32_t{0x7f800000u});
    case DType::kBFloat16:
      return count_exponent_full(static_cast<const uint16_t*>(x), n, uint16_t{0x7f80u});
    case DType::kFloat16:
      return count_exponent_full(static_cast<const uint16_t*>(x), n, uint16_t{0x7c00u});
    default:
      return count_exponent_full(static_cast<const uint64_t*>(x), n, uint64_t{0x7ff0000000000000u});
  }
}

// ---- accumulate_squares ------------------------------------------------------------------------

template <class Load>
inline __attribute__((always_inline)) void accumulate_with(Load load, float* __restrict square_sums,
                                                           float* __restrict sums, float weight,
                                                           int64_t n) {
  if (square_sums && sums) {
    for (int64_t i = 0; i < n; ++i) {
      const float g = load(i);
      square_sums[i] = square_sums[i] + weight * (g * g);
      sums[i] = sums[i] + weight * g;
    }
  } else if (square_sums) {
    for (int64_t i = 0; i < n; ++i) {
      const float g = load(i);
      square_sums[i] = square_sums[i] + weight * (g * g);
    }
  } else if (sums) {
    for (int64_t i = 0; i < n; ++i) sums[i] = sums[i] + weight * load(i);
  }
}

void accumulate_squares(DType dtype, const void* g, float* square_sums, float* sums, float weight,
                        int64_t n) {
  if (dtype == DType::kFloat32) {
    const float* x = static_cast<const float*>(g);
    accumulate_with([x](int64_t i) { return x[i]; }, square_sums, sums, weight, n);
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(g);
    accumulate_with([x](int64_t i) { return bf16_to_float(x[i]); }, square_sums, sums, weight, n);
  } else {
    float wide[kBlock];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t m = n - begin < kBlock ? n - begin : kBlock;
      widen_fp16(static_cast<const uint16_t*>(g) + begin, wide, m);
      const float* x = wide;
      accumulate_with([x](int64_t i) { return x[i]; }, square_sums ? square_sums + begin : nullptr,
                      sums ? sums + begin : nullptr, weight, m);
    }
  }
}

// ---- select_topk -------------------------------------------------------------------------------

void evaluate(Score score, const float* first, const float* second, float constant, float* out,
              int64_t n) {
  switch (score) {
    case Score::kPieceS:
      for (int64_t i = 0; i < n; ++i) out[i] = score_piece_s(first[i], second[i], constant);
      break;
    case Score::kPieceG:
      for (int64_t i = 0; i < n; ++i) out[i] = score_piece_g(first[i], second[i], constant);
      break;
    case Score::kMagnitude:
      for (int64_t i = 0; i < n; ++i) out[i] = absolute(first[i]);
      break;
    case Score::kSnip:
      for (int64_t i = 0; i < n; ++i) out[i] = score_snip(first[i], second[i]);
      break;
    case Score::kTaylor:
      for (int64_t i = 0; i < n; ++i) out[i] = score_taylor(first[i], second[i]);
      break;
    default:
      break;
  }
}

// 64 elements at a time: one mask says whether any of them matters; at 0.1 % nine in ten such
// groups hold none, so the loop runs at the speed of the loads.
template <class T>
inline __attribute__((always_inline)) int64_t scan(const T* x, int64_t n, T bound, bool keep_ties,
                                                   uint32_t* positions, int64_t* ties) {
  int64_t found = 0;
  int64_t tied = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    prefetch_ahead(x + i);
    uint64_t mask = not_less_mask(x + i, bound);
    if (!mask) continue;
    if (!keep_ties) {
      const uint64_t equal = equal_mask(x + i, bound);
      tied += __builtin_popcountll(equal);
      mask &= ~equal;
    }
    while (mask) {
      positions[found++] = static_cast<uint32_t>(i + __builtin_ctzll(mask));
      mask &= mask - 1;
    }
  }
  for (; i < n; ++i) {
    if (x[i] < bound) continue;
    if (!keep_ties && x[i] == bound) {
      ++tied;
    } else {
      positions[found++] = static_cast<uint32_t>(i);
    }
  }
  *ties += tied;
  return found;
}

int64_t scan_float(const float* x, int64_t n, float bound, bool keep_ties, uint32_t* positions,
                   int64_t* ties) {
  return scan(x, n, bound, keep_ties, positions, ties);
}

int64_t scan_double(const double* x, int64_t n, double bound, bool keep_ties, uint32_t* positions,
                    int64_t* ties) {
  return scan(x, n, bound, keep_ties, positions, ties);
}

void keys_float(const float* x, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = to_key(x[i]);
}

void keys_double(const double* x, int64_t n, uint64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = to_key(x[i]);
}

// ---- sparse_adamw ------------------------------------------------------------------------------

void adamw(float* __restrict values, float* __restrict exp_avgs, float* __restrict exp_avg_sqs,
           const float* __restrict grads, int64_t n, const AdamwFactors& factors) {
  const AdamwFactors f = factors;
  for (int64_t i = 0; i < n; ++i) {
    adamw_step(values[i], exp_avgs[i], exp_avg_sqs[i], grads[i], f);
  }
}

// ---- accumulate_per_sample_squares -------------------------------------------------------------

// One word a token: float32, to which 16-bit types are widened.
template <int kPanel>
void pack_float(DType dtype, const void* x, int64_t stride, int64_t tokens, int64_t width,
                uint32_t* out, int64_t panel_words) {
  constexpr int64_t kChunk = kBlock / kPanel * kPanel;
  float wide[kChunk];
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  const char* bytes = static_cast<const char*>(x);
  for (int64_t t = 0; t < tokens; ++t, bytes += stride * size) {
    for (int64_t begin = 0; begin < width; begin += kChunk) {
      const int64_t n = width - begin < kChunk ? width - begin : kChunk;
      const void* source = bytes + begin * size;
      if (dtype != DType::kFloat32) to_float(dtype, source, wide, n);
      const float* from = dtype == DType::kFloat32 ? static_cast<const float*>(source) : wide;
      uint32_t* to = out + begin / kPanel * panel_words + t * kPanel;
      int64_t i = 0;
      for (; i + kPanel <= n; i += kPanel, to += panel_words) {
        __builtin_memcpy(to, from + i, kPanel * sizeof(float));
      }
      if (i < n) {
        __builtin_memset(to, 0, kPanel * sizeof(float));
        __builtin_memcpy(to, from + i, static_cast<size_t>(n - i) * sizeof(float));
      }
    }
  }
}

const Products kProducts = {
    kProductRows,
    kProductVectors * FloatLanes::kLanes,
    1,
    1,
    pack_float<kProductRows>,
    pack_float<kProductVectors * FloatLanes::kLanes>,
    product_tile<FloatLanes, kProductRows, kProductVectors>,
    nullptr,
    nullptr,
    nullptr,
};

bool add_block(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
               int64_t columns) {
  constexpr uint32_t kExponent = 0x7f800000u;
  uint32_t any = 0;
  for (int64_t r = 0; r < rows; ++r) {
    float* __restrict sums = to + r * to_stride;
    const float* __restrict added = from + r * from_stride;
    for (int64_t c = 0; c < columns; ++c) {
      sums[c] = sums[c] + added[c];
      uint32_t bits;
      __builtin_memcpy(&bits, &sums[c], sizeof(bits));
      any |= (bits & kExponent) == kExponent ? 1u : 0u;
    }
  }
  return any != 0;
}

// ---- add_rounded -------------------------------------------------------------------------------

bool add_rounded(uint16_t* __restrict target, const float* __restrict value, uint32_t place,
                 uint32_t key, int64_t n) {
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float sum = bf16_to_float(target[i]) + value[i];
    target[i] = float_to_bf16_at_random(sum, hash_32((place + static_cast<uint32_t>(i)) ^ key));
    any |= (target[i] & 0x7f80u) == 0x7f80u ? 1u : 0u;
  }
  return any != 0;
}

// ---- sampled_weight_grad -----------------------------------------------------------------------

// From this many used columns among kWide on, a block of kWide x kWide is transposed in registers;
// below, the columns are copied element by element.
constexpr int64_t kBlockColumns = kWide / 4;

// kWide consecutive columns from base on; column base + u goes to to[u].
struct Window {
  int64_t base;
  float* to[kWide];
};

template <class Element>
inline __attribute__((always_inline)) void transpose_with(const Element* x, int64_t row_stride,
                                                          int64_t width, int64_t tokens,
                                                          const int64_t* columns, int64_t n,
                                                          float* panel, int64_t stride) {
  float sink[kSampledBlock];  // for columns of a window that nobody wants
  Window windows[kColumnsAtOnce / kBlockColumns];
  int32_t single[kColumnsAtOnce];
  int64_t n_windows = 0;
  int64_t n_single = 0;
  for (int64_t c = 0; c < n;) {
    const int64_t base = columns[c] + kWide <= width ? columns[c] : width - kWide;
    int64_t end = c + 1;
    while (end < n && columns[end] < base + kWide) ++end;
    if (base >= 0 && end - c >= kBlockColumns) {
      Window& window = windows[n_windows++];
      window.base = base;
      for (int u = 0; u < kWide; ++u) window.to[u] = sink;
      for (; c < end; ++c) window.to[columns[c] - base] = panel + c * stride;
    } else {
      for (; c < end; ++c) single[n_single++] = static_cast<int32_t>(c);
    }
  }
  // The next kWide tokens of a window are asked for: its lines lie a row apart, too short for the
  // hardware to see a stream. A head of 49152 columns went from 5.6 to 4.4 ms (bfloat16), and what
  // is in cache lost nothing.
  const uintptr_t row_bytes = static_cast<uintptr_t>(row_stride) * sizeof(Element);
  int64_t t = 0;
  for (; t + kWide <= tokens; t += kWide) {
    const Element* from = x + t * row_stride;
    for (int64_t w = 0; w < n_windows; ++w) {
      const Window& window = windows[w];
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(from + window.base) + kWide * row_bytes;
      Wide block[kWide];
      for (int u = 0; u < kWide; ++u) {
        block[u] = load_wide(from + u * row_stride + window.base);
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + u * row_bytes));
      }
      transpose(block);
      for (int u = 0; u < kWide; ++u) store_wide(window.to[u] + t, block[u]);
    }
    for (int64_t k = 0; k < n_single; ++k) {
      float* to = panel + single[k] * stride + t;
      const Element* column = from + columns[single[k]];
      for (int u = 0; u < kWide; ++u) to[u] = widen(column[u * row_stride]);
    }
  }
  const int64_t padded = (tokens + kSampledLanes - 1) / kSampledLanes * kSampledLanes;
  if (t == padded) return;
  for (int64_t c = 0; c < n; ++c) {
    float* to = panel + c * stride;
    for (int64_t r = t; r < tokens; ++r) to[r] = widen(x[r * row_stride + columns[c]]);
    for (int64_t r = tokens; r < padded; ++r) to[r] = 0.0f;
  }
}

void transpose_columns(DType dtype, const void* x, int64_t row_stride, int64_t width,
                       int64_t tokens, const int64_t* columns, int64_t n, float* panel,
                       int64_t stride) {
  switch (dtype) {
    case DType::kFloat32:
      return transpose_with(static_cast<const float*>(x), row_stride, width, tokens, columns, n,
                            panel, stride);
    case DType::kBFloat16:
      return transpose_with(static_cast<const Bf16*>(x), row_stride, width, tokens, columns, n,
                            panel, stride);
    default:
      return transpose_with(static_cast<const Fp16*>(x), row_stride, width, tokens, columns, n,
                            panel, stride);
  }
}

// lanes[p][u]: lanes p * kWide ... of the sum number u. The tree: parts first, then the kWide sums
// are transposed, so that the steps inside a vector are kWide sums wide too.
constexpr int kParts = static_cast<int>(kSampledLanes) / kWide;

inline __attribute__((always_inline)) Wide add_lanes(Wide (*lanes)[kWide]) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int p = 0; p < half; ++p) {
      for (int u = 0; u < kWide; ++u) lanes[p][u] = lanes[p][u] + lanes[p + half][u];
    }
  }
  Wide* sums = lanes[0];
  transpose(sums);
  for (int half = kWide / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] = sums[l] + sums[l + half];
  }
  return sums[0];
}

void sampled_dots(const float* first, const int32_t* a, const float* second, const int32_t* b,
                  int64_t stride, int64_t tokens, int64_t n, float* out) {
  for (int64_t begin = 0; begin < n; begin += kWide) {
    Wide lanes[kParts][kWide];
    for (int u = 0; u < kWide; ++u) {
      const int64_t s = begin + u < n ? begin + u : n - 1;
      const float* x = first + a[s] * stride;
      const float* y = second + b[s] * stride;
      Wide own[kParts] = {};
      for (int64_t t = 0; t < tokens; t += kSampledLanes) {
        for (int p = 0; p < kParts; ++p) {
          own[p] = own[p] + load_wide(x + t + p * kWide) * load_wide(y + t + p * kWide);
        }
      }
      for (int p = 0; p < kParts; ++p) lanes[p][u] = own[p];
    }
    const Wide sums = add_lanes(lanes);
    if (begin + kWide <= n) {
      store_wide(out + begin, load_wide(out + begin) + sums);
    } else {
      float rest[kWide];
      store_wide(rest, sums);
      for (int64_t s = begin; s < n; ++s) out[s] = out[s] + rest[s - begin];
    }
  }
}

// Tiles of kWide sums, as square as they can be: what one row brings serves several columns, and
// the accumulators fit the registers.
void dense_dots(const float* first, const float* second, int64_t stride, int64_t tokens, int64_t n,
                float* out) {
  constexpr int kRows = kWide == 16 ? 4 : 2;
  constexpr int kColumns = kWide / kRows;
  for (int64_t column = 0; column < n; column += kColumns) {
    const float* y[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      y[c] = second + (column + c < n ? column + c : n - 1) * stride;
    }
    for (int64_t row = 0; row < kTileRows; row += kRows) {
      const float* x = first + row * stride;
      Wide lanes[kParts][kWide];
      for (int p = 0; p < kParts; ++p) {
        Wide own[kRows][kColumns] = {};
        for (int64_t t = p * kWide; t < tokens; t += kSampledLanes) {
          for (int r = 0; r < kRows; ++r) {
            const Wide xs = load_wide(x + r * stride + t);
            for (int c = 0; c < kColumns; ++c) {
              own[r][c] = own[r][c] + xs * load_wide(y[c] + t);
            }
          }
        }
        for (int u = 0; u < kWide; ++u) lanes[p][u] = own[u / kColumns][u % kColumns];
      }
      float sums[kWide];
      store_wide(sums, add_lanes(lanes));
      for (int u = 0; u < kWide; ++u) {
        const int64_t c = column + u % kColumns;
        if (c < n) out[(row + u / kColumns) * n + c] = sums[u];
      }
    }
  }
}

// How far ahead rows are asked for, in elements: 4 KiB, the fastest of 0 to 16 (cold, two threads:
// 173 us for 1536 x 576 in float32, without 271), in whole rows.
template <class Element>
inline __attribute__((always_inline)) int64_t ahead_of(const ConstMatrix& matrix) {
  constexpr int64_t kAhead = 4096 / sizeof(Element);
  if (matrix.row_stride == 0) return 0;  // of a single row it may be anything
  const int64_t rows = matrix.row_stride < kAhead ? kAhead / matrix.row_stride : 1;
  return rows * matrix.row_stride;
}

// Row t, and a request for the one so many elements further on.
template <class Element>
inline __attribute__((always_inline)) const Element* row_of(const ConstMatrix& matrix, int64_t t,
                                                            int64_t ahead) {
  const Element* row = static_cast<const Element*>(matrix.data) + t * matrix.row_stride;
  const uintptr_t next = reinterpret_cast<uintptr_t>(row) + ahead * sizeof(Element);
  for (uintptr_t line = 0; line < matrix.columns * sizeof(Element); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(next + line));
  }
  return row;
}

template <class Element>
inline __attribute__((always_inline)) void gathered_with(const ConstMatrix& grad, const int32_t* a,
                                                         const ConstMatrix& input, const int32_t* b,
                                                         int64_t n, float* lanes, float* out) {
  const int64_t grad_ahead = ahead_of<Element>(grad);
  const int64_t input_ahead = ahead_of<Element>(input);
  for (int64_t i = 0; i < kSampledLanes * n; ++i) lanes[i] = 0.0f;
  for (int64_t t = 0; t < grad.rows; ++t) {
    const Element* g = row_of<Element>(grad, t, grad_ahead);
    const Element* x = row_of<Element>(input, t, input_ahead);
    float* lane = lanes + t % kSampledLanes * n;
    for (int64_t s = 0; s < n; s += kWide) {
      const Wide product = gather_wide(g, a + s) * gather_wide(x, b + s);
      store_wide(lane + s, load_wide(lane + s) + product);
    }
  }
  for (int64_t half = kSampledLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half * n; ++i) lanes[i] = lanes[i] + lanes[half * n + i];
  }
  for (int64_t s = 0; s < n; ++s) out[s] = out[s] + lanes[s];
}

void gathered_dots(const ConstMatrix& grad, const int32_t* a, const ConstMatrix& input,
                   const int32_t* b, int64_t n, float* lanes, float* out) {
  switch (grad.dtype) {
    case DType::kFloat32:
      return gathered_with<float>(grad, a, input, b, n, lanes, out);
    case DType::kBFloat16:
      return gathered_with<Bf16>(grad, a, input, b, n, lanes, out);
    default:
      return gathered_with<Fp16>(grad, a, input, b, n, lanes, out);
  }
}

// ---- the read floor ----------------------------------------------------------------------------

uint64_t read(const void* data, int64_t n_bytes) {
  const uint64_t* words = static_cast<const uint64_t*>(data);
  const int64_t n = n_bytes / 8;
  uint64_t folded = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    prefetch_ahead(words + i);
    for (int64_t j = 0; j < 64; ++j) folded ^= words[i + j];
  }
  for (; i < n; ++i) folded ^= words[i];
  return folded;
}

}  // namespace

const Bodies kBodies = {
    count_nonfinite, accumulate_squares, add_block,     add_rounded, to_float,   evaluate,
    scan_float,      scan_double,        keys_float,    keys_double, adamw,      transpose_columns,
    sampled_dots,    dense_dots,         gathered_dots, read,        &kProducts,
};

}  // namespace piece_ops::cpu::PIECE_OPS_ISA_NAMESPACE
