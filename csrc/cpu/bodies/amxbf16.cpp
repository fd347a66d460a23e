// amxbf16.cpp - products of bfloat16 pairs by AMX's tile registers: Sapphire Rapids and later.
//
// A tile of 32 x 32 sums is four tile registers; 32 tokens of it are two loads of G, two of X and
// four instructions of 8192 multiply-adds, 16 cycles each. Products are exact; pairs are added to a
// float32 sum in the order of the tokens (TDPBF16PS), subnormal numbers and results count as 0.
// G's words are packed by row (16 words of a row are a line of a tile register), X's by step, and
// both with zeros up to a multiple of 16 steps: a sample of 1 token costs what one of 32 does.
//
// Squares are taken by AVX-512, from the 4 KiB in L1 to which a tile's sums are stored.
#if defined(__x86_64__)
#include <immintrin.h>

#include "bodies.h"

namespace piece_ops::cpu::amxbf16 {
namespace {

constexpr int kTile = 16;           // rows of a tile register; words in one of its lines
constexpr int kSide = 2 * kTile;    // rows and columns of a tile of sums
constexpr int kLine = kSide * 4;    // bytes from a line of sums, or of X's words, to the next
constexpr int kTokens = 2 * kTile;  // in a step of the loop

// What LDTILECFG reads: palette 1, all eight registers 16 lines of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

// 16 features from feature `at` of tokens t and t + 1, a pair a word; zeros past tokens and width.
inline __m512i pairs_of(const uint16_t* x, int64_t stride, int64_t t, int64_t tokens, int64_t at,
                        int64_t width) {
  const int64_t left = width - at;
  if (t >= tokens || left <= 0) return _mm512_setzero_si512();
  const auto mask = static_cast<__mmask16>(left >= kTile ? 0xffffu : (1u << left) - 1);
  const uint16_t* first = x + t * stride + at;
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
  if (t + 1 >= tokens) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + stride));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// rows[i] word j becomes rows[j] word i: by halves of 2, 4, 8 and 16 words.
inline void transpose(__m512i (&rows)[16]) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

// [16 steps][row][16 words of it]
void pack_rows(DType, const void* x, int64_t stride, int64_t tokens, int64_t width, uint32_t* out,
               int64_t panel_words) {
  const uint16_t* first = static_cast<const uint16_t*>(x);
  for (int64_t panel = 0; panel < width; panel += kSide, out += panel_words) {
    uint32_t* to = out;
    for (int64_t t = 0; t < tokens; t += kTokens) {
      for (int64_t at = panel; at < panel + kSide; at += kTile, to += kTile * kTile) {
        __m512i words[kTile];
        for (int s = 0; s < kTile; ++s) {
          words[s] = pairs_of(first, stride, t + 2 * s, tokens, at, width);
        }
        transpose(words);
        for (int r = 0; r < kTile; ++r) _mm512_store_si512(to + r * kTile, words[r]);
      }
    }
  }
}

// [step][32 columns]
void pack_columns(DType, const void* x, int64_t stride, int64_t tokens, int64_t width,
                  uint32_t* out, int64_t panel_words) {
  const uint16_t* first = static_cast<const uint16_t*>(x);
  const int64_t steps = (tokens + kTokens - 1) / kTokens * kTile;
  for (int64_t s = 0; s < steps; ++s, out += kSide) {
    uint32_t* to = out;
    for (int64_t panel = 0; panel < width; panel += kSide, to += panel_words) {
      for (int64_t v = 0; v < kSide; v += kTile) {
        _mm512_store_si512(to + v, pairs_of(first, stride, 2 * s, tokens, panel + v, width));
      }
    }
  }
}

// Squares of sums that are stored.
void finish(const TileOut& out) {
  if (!out.ends) return;
  const __m512 scale = _mm512_set1_ps(out.scale);
  for (int at = 0; at < kSide * kSide; at += kTile) {
    const __m512 g = _mm512_mul_ps(_mm512_load_ps(out.partial + at), scale);
    if (out.square_sums) {
      float* to = out.square_sums + at;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_mul_ps(g, g)));
    }
    if (out.sums) {
      float* to = out.sums + at;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), g));
    }
  }
}

// The previous tile's squares are taken while this one's products are on their way: the units are
// different ones, and a store of sums that waits for its products would hold up both.
void tile(const uint32_t* rows, const uint32_t* columns, int64_t steps, const TileOut& out,
          const TileOut* previous) {
  float* const partial = out.partial;
  if (out.begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, partial, kLine);
    _tile_loadd(1, partial + kTile, kLine);
    _tile_loadd(2, partial + kTile * kSide, kLine);
    _tile_loadd(3, partial + kTile * kSide + kTile, kLine);
  }
  for (int64_t s = 0; s < steps; s += kTile, rows += kTile * kSide, columns += kTile * kSide) {
    _tile_loadd(4, rows, 4 * kTile);
    _tile_loadd(6, columns, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, columns + kTile, kLine);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + kTile * kTile, 4 * kTile);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  if (previous) finish(*previous);
  _tile_stored(0, partial, kLine);
  _tile_stored(1, partial + kTile, kLine);
  _tile_stored(2, partial + kTile * kSide, kLine);
  _tile_stored(3, partial + kTile * kSide + kTile, kLine);
}

}  // namespace

const Products kProducts = {kSide,        kSide, 2,      kTile, pack_rows,
                            pack_columns, tile,  finish, begin, end};

}  // namespace piece_ops::cpu::amxbf16
#endif
