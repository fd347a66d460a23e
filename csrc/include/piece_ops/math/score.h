// score.h - the score formulas: how much a parameter matters, from one or two accumulated numbers.
//
// `first` and `second` are per-parameter statistics in float32 (see the list), `constant` is one
// number for the whole selection. Each formula is evaluated in float32 exactly as written, with
// + * / sqrt only, so every backend gives the same bits.
//
//   kPlain      first                              any stored score; PIECE-F on the sum of squares
//   kPieceS     |first| / sqrt(second + constant)  sums, square sums; constant = xi * samples
//   kPieceG     |first| / (second + constant)      sums, square sums of what must be kept
//   kMagnitude  |first|                            sums ("gradient") or weights
//   kSnip       |first * second|                   sums, weights
//   kTaylor     first * (second * second)          square sums, weights
//   kRandom     uniform in [0, 1) from (seed, position): needs no data
//
// Source: PIECE arXiv 2511.15375 (S, F); SNIP arXiv 1810.02340; Fisher-Taylor arXiv 1906.10771.
#pragma once

#include <cmath>
#include <cstdint>

#include "piece_ops/math/hd.h"

namespace piece_ops {

enum class Score : int32_t {
  kPlain = 0,
  kPieceS = 1,
  kPieceG = 2,
  kMagnitude = 3,
  kSnip = 4,
  kTaylor = 5,
  kRandom = 6,
};
constexpr int32_t kScoreCount = 7;

// |x| by clearing the sign bit: std::fabs is a host function only.
PIECE_OPS_HD float absolute(float x) { return x < 0.0f ? -x : x + 0.0f; }

PIECE_OPS_HD float score_piece_s(float first, float second, float constant) {
  return absolute(first) / sqrtf(second + constant);
}
PIECE_OPS_HD float score_piece_g(float first, float second, float constant) {
  return absolute(first) / (second + constant);
}
PIECE_OPS_HD float score_snip(float first, float second) { return absolute(first * second); }
PIECE_OPS_HD float score_taylor(float first, float second) { return first * (second * second); }

// Counter-based: the score of a position does not depend on how the work is divided.
// The finaliser of splitmix64 (Steele, Lea, Flood 2014), applied twice; the top 24 bits.
PIECE_OPS_HD float score_random(uint64_t seed, int64_t position) {
  uint64_t z = static_cast<uint64_t>(position) + seed * 0x9e3779b97f4a7c15ull;
  for (int round = 0; round < 2; ++round) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z = z ^ (z >> 31);
  }
  return static_cast<float>(static_cast<uint32_t>(z >> 40)) * 5.9604644775390625e-8f;  // 2^-24
}

PIECE_OPS_HD bool score_needs_second(Score score) {
  return score == Score::kPieceS || score == Score::kPieceG || score == Score::kSnip ||
         score == Score::kTaylor;
}

PIECE_OPS_HD float evaluate_score(Score score, float first, float second, float constant) {
  switch (score) {
    case Score::kPieceS:
      return score_piece_s(first, second, constant);
    case Score::kPieceG:
      return score_piece_g(first, second, constant);
    case Score::kMagnitude:
      return absolute(first);
    case Score::kSnip:
      return score_snip(first, second);
    case Score::kTaylor:
      return score_taylor(first, second);
    default:
      return first;
  }
}

}  // namespace piece_ops
