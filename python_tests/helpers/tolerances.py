"""What may differ from the reference, one row per op, each with the reason for its size.

What is not here is compared bit for bit: selections, gather, scatter_, and every elementwise result
against the float32 reference. The rows bound the distance to exact (float64) arithmetic.
"""

from __future__ import annotations

EPS32 = 2.0**-24  # unit roundoff of float32: one correctly rounded operation errs by at most this
EPS64 = 2.0**-53

# accumulate_squares_, one call, relative to |accumulator| + weight * g^2 (a sum of positive terms):
# g*g, times weight, weight itself rounded to float32, and the addition: four roundings.
ACCUMULATE_SQUARES = 4 * EPS32
# The signed sums, relative to |accumulator| + |weight * g|: the product, the weight, the addition.
ACCUMULATE_SUMS = 3 * EPS32

# sparse_adamw_ over 100 steps against float64, relative to 1 + |p|, with lr <= 1e-2:
# per step the decay and the subtraction round p (2 eps |p|) and the update carries about 10
# roundings of a term of size lr; 100 steps of 2 eps, doubled for the moments' own drift.
ADAMW_100_STEPS = 100 * 4 * EPS32

# sparse_adamw_ against torch.optim.AdamW (single tensor, float32) over 100 steps: the same formula,
# another order of operations (lerp, addcmul and addcdiv contract or reassociate), so each side may
# be ADAMW_100_STEPS away from exact.
ADAMW_TORCH_100_STEPS = 2 * ADAMW_100_STEPS

# total: float64 partial sums; relative to the sum of |x|. A blocked sum of n <= 2^21 float64
# additions errs by at most (longest chain) * eps; 2^12 is the longest chain allowed here.
TOTAL = 2**12 * EPS64

# sampled_weight_grad against float64, relative to sum_t |grad_output| |input|: one rounding of the
# product and, on the way of a product to the result, at most 8 additions in its lane, 5 in the tree
# and one for each block of 256 tokens (of which the tests have at most 10).
SAMPLED_WEIGHT_GRAD = (1 + 8 + 5 + 10) * EPS32


def sum_of_products(terms: int) -> float:
    """Values' gradients that sum over the tokens in any order, relative to the sum of |g x|.

    Each product rounds once (not at all for 16-bit inputs), and in whatever order n products are
    added, none goes through more than n - 1 additions; one more for a weight used twice, whose
    gradients autograd adds.
    """
    return (terms + 1) * EPS32


# 50 training steps with sampled gradients against 50 with dense ones, in float32, of losses and
# values, relative to 1 + |x|: AdamW's own roundings on both sides, and as much again for gradients
# that differ by the order of their sums, which AdamW makes steps of lr <= 1e-2 times that.
TRAINING_50_STEPS = 2 * (ADAMW_TORCH_100_STEPS / 2)
# The same with bfloat16 weights, of the losses. The dense route rounds its gradients to bfloat16,
# so masters drift apart until weights round to neighbours: losses as far apart as bfloat16 numbers.
TRAINING_50_STEPS_BF16 = 2.0**-8
# Of SmolLM2 (30 layers) that is the bound of the mean over the steps; of a single step four times
# it. Swapping the two rows of the batch, which changes nothing but roundings, moved single losses
# by up to 1.9 x 2^-8 (sampled) and 1.1 x (dense), in the mean by 0.28 and 0.32 x; one route against
# the other 2.05 x and 0.55 x (2026-11-28).
TRAINING_50_STEPS_BF16_REAL = 4 * TRAINING_50_STEPS_BF16


def per_sample_sums(tokens: int, samples: int) -> float:
    """accumulate_per_sample_squares_, relative to |start| + sum_n |scale_n| |G_n|^T |X_n|.

    A sample's gradient is a sum of at most `tokens` float32 products in any order (tokens
    roundings), times the scale (1); then one addition a sample, one into the accumulator, and 1
    for what those errors add to each other.
    """
    return (tokens + samples + 3) * EPS32


def per_sample_squares(tokens: int, samples: int) -> float:
    """The square sums, relative to |start| + sum_n (|scale_n| |G_n|^T |X_n|)^2.

    Squaring doubles the gradient's relative error and rounds once.
    """
    return (2 * (tokens + 1) + samples + 4) * EPS32


# A delta exported to SHiRA, float32 weights, relative to |value| + |value - base|: the difference
# is rounded once by us, base + difference once by peft; the quadratic term is covered by the 1.01.
SHIRA_WEIGHT = 1.01 * EPS32
# The logits then, relative to the largest one: about 15 products of width 40 in a row (two layers),
# each of whose terms has a weight that is off by two roundings and is rounded itself.
SHIRA_LOGITS = 15 * 40 * 3 * EPS32

# Per-sample gradients of a model of a few layers, batched or not, against float64; relative to the
# largest gradient element of the sample anywhere in the model. Each number comes through some tens
# of products and sums of up to a hundred terms, forward and back: 2^8 roundings of float32. In
# bfloat16 (unit roundoff 2^-9) activations are rounded between layers, sums inside are not: 2^4.
PER_SAMPLE_GRADIENT = 2**8 * EPS32
PER_SAMPLE_GRADIENT_BF16 = 2**4 * 2.0**-9


def rounded_sum_error(terms: int, largest: float, copies: int) -> float:
    """bfloat16 sums rounded at random: how far the mean of independent copies may be off.

    Every addition errs by less than one place (2^-7 relative, mean zero), independently; four
    standard deviations of the mean over `copies`.
    """
    return 4.0 * 2.0**-7 * largest * (terms / copies) ** 0.5


# piece_ops.predict against bench/results/cpu.jsonl, predicted over measured time, either way: the
# ratios stand in docs/scale.md. Twice what they leave of 1, since a file recorded on another or a
# busier machine is no reason to fail; a forgotten pass over the data is more. Ops that stream: a
# tensor of some megabytes stays in the cache between two passes that the model counts as two reads
# (so too much), and a score with a root and a division is bound by arithmetic (too little).
# Scattered ops: the model knows bandwidth, but a CPU's scattered access waits for latency.
PREDICTED_STREAMS = 3.0
PREDICTED_SCATTERED = 5.0
# ... of the whole pipeline: products at the rate of one large matrix product, which a step's many
# small ones do not reach; attention and loss, which are not counted.
PREDICTED_PHASES = 5.0
# ... and against the H200 times in the headers of the kernels, which are rounded to one or two
# digits and hold details (epilogues, launches) that the byte model leaves out.
PREDICTED_HEADERS = 1.2
