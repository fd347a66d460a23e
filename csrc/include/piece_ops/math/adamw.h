// adamw.h - one AdamW step on one number.
//
//   p <- p * decay                       decay = 1 - lr * weight_decay
//   m <- m + (g - m) * (1 - beta1)
//   v <- v * beta2 + (g * g) * (1 - beta2)
//   p <- p - step_size * (m / (sqrt(v) / root_correction2 + eps))
//
// with step_size = lr / (1 - beta1^t) and root_correction2 = sqrt(1 - beta2^t). The powers are
// computed once on the host in double (pow is not bit-equal between libm and CUDA); the rest is
// float32 with + - * / sqrt, the same bits everywhere.
// Source: Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2, in the form of torch.optim.AdamW.
#pragma once

#include <cmath>

#include "piece_ops/math/hd.h"

namespace piece_ops {

struct AdamwFactors {
  float decay;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;
  float root_correction2;
  float eps;
};

inline AdamwFactors make_adamw_factors(double step, double lr, double beta1, double beta2,
                                       double eps, double weight_decay) {
  AdamwFactors f;
  f.decay = static_cast<float>(1.0 - lr * weight_decay);
  f.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  f.beta2 = static_cast<float>(beta2);
  f.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  f.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  f.root_correction2 = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, step)));
  f.eps = static_cast<float>(eps);
  return f;
}

PIECE_OPS_HD void adamw_step(float& p, float& m, float& v, float g, const AdamwFactors& f) {
  m = m + (g - m) * f.one_minus_beta1;
  v = v * f.beta2 + (g * g) * f.one_minus_beta2;
  const float denominator = sqrtf(v) / f.root_correction2 + f.eps;
  p = p * f.decay - f.step_size * (m / denominator);
}

}  // namespace piece_ops
