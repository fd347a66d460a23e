// select_topk_quick.h - which scores cannot reach the bound, without the division that makes them.
//
// A square root and a division cost some 30 instructions, in branches that do not overlap: with them
// a selection by PIECE-S of 2 x 1e9 float32 took 3.7 ms on an H200 (2026-11-28), where one read takes
// 1.9. Four instructions decide almost all of them. With v = second + constant, as the score has it,
//
//   PIECE-S   |first| / sqrt(v) < bound   if   first^2 < v * (bound^2 * less)
//   PIECE-G   |first| / v       < bound   if   |first| < v * (bound * less),   less = 1 - 2^-20
//
// and never the other way round. Rounding keeps order: a product that is smaller than the other in
// float32 is so without rounding, below the smallest normal number and at infinity too. What is left
// are two roundings of the factor and two of the score, each of 2^-24, for which `less` has room.
// Comparisons with NaN are false, so nothing is ruled out where first, v or the score is NaN, v is
// zero or negative, or infinity meets infinity.
#pragma once

#include "select_topk_load.h"

namespace piece_ops::cuda {

// Of PIECE-S or PIECE-G.
template <Score kScore>
class QuickBound {
  static_assert(kScore == Score::kPieceS || kScore == Score::kPieceG, "a score with a division");
  static constexpr bool kIsRoot = kScore == Score::kPieceS;

 public:
  // For scores that are to be compared with `bound`. One that is not positive, or whose square is
  // near the ends of the normal numbers, rules nothing out.
  PIECE_OPS_DEVICE QuickBound(const TopkFormula& formula, float bound)
      : constant_(formula.constant) {
    constexpr float kLess = 1.0f - 9.5367431640625e-7f;  // 1 - 2^-20
    const bool has_room = bound > 1e-15f && bound < 1e15f;
    factor_ = !has_room ? bit_cast<float>(0x7fc00000u)  // NaN
              : kIsRoot ? bound * bound * kLess
                        : bound * kLess;
  }

  // May the score of these reach the bound, or be NaN?
  PIECE_OPS_DEVICE bool may_reach(float first, float second) const {
    const float v = second + constant_;
    const float left = kIsRoot ? first * first : absolute(first);
    return !(left < v * factor_);
  }
  PIECE_OPS_DEVICE float score(float first, float second) const {
    return kIsRoot ? score_piece_s(first, second, constant_)
                   : score_piece_g(first, second, constant_);
  }

 private:
  float constant_;
  float factor_;
};

}  // namespace piece_ops::cuda
