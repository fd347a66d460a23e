"""Every op in plain torch: what the native code must compute, written to be checked by eye.

Imported by the tests and by the benchmarks only. It imports nothing of the library, so it can be
trusted as an independent answer. It is slow (stable sorts, one temporary per arithmetic operation)
and takes more memory than the ops do. The structures are those of the public functions: one
tensor, a list or tuple, or a dict.

Arithmetic is elementwise float32 with one rounding per operation, exactly as the formula in each
docstring is written. torch rounds ``+ - * /`` as IEEE 754 asks, but not its float32 ``sqrt`` (one
result in five is off by its last bit on the CPU), hence `_sqrt`. So the native results must be
equal bit for bit. Scalars (weights, rates, powers of beta) are computed in double and rounded to
float32 once, before use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """``indices`` mirror the scores; the others are scalars (global) or mirrored (tensor)."""

    indices: Any
    threshold: Any
    ties_kept: Any


@dataclass(frozen=True)
class Score:
    """The fields of the public ``Score`` that `score_values` reads (any such object will do)."""

    kind: str
    first: Any
    second: Any = None
    constant: float = 0.0
    seed: int = 0


def _flat(tensors: Any) -> list[Tensor]:
    """The tensors of a structure, in order, as a list."""
    if tensors is None:
        return []
    if isinstance(tensors, dict):
        return list(tensors.values())
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]


def _mirror(like: Any, values: Sequence[Any]) -> Any:
    """`values` in the structure of `like`."""
    if isinstance(like, dict):
        return dict(zip(like, values, strict=True))
    if isinstance(like, (list, tuple)):
        return type(like)(values)
    return values[0]


def _labels(like: Any, name: str) -> list[str]:
    """How an error names each tensor: ``grads``, ``grads[3]`` or ``grads['lm_head.weight']``."""
    if isinstance(like, dict):
        return [f"{name}[{key!r}]" for key in like]
    return [f"{name}[{i}]" for i in range(len(like))] if isinstance(like, (list, tuple)) else [name]


def _scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded: a float64 root rounds to the float32 one, as 53 >= 2 * 24 + 2 bits."""
    return x.to(torch.float64).sqrt().to(x.dtype)


# ----------------------------------------------------------------------------- accumulate_squares_


def accumulate_squares_(
    square_sums: Any, grads: Any, sums: Any = None, weight: float = 1.0
) -> None:
    """``square_sums += weight * (g * g)``, ``sums += weight * g``; a non-finite g: no change."""
    for label, grad in zip(_labels(grads, "grads"), _flat(grads), strict=True):
        bad = int((~torch.isfinite(grad)).sum())
        if bad:
            raise ValueError(
                f"piece_ops.accumulate_squares_: {label} must be finite, got {bad} "
                "NaN or infinite values"
            )
    w = _scalar(weight)
    for i, grad in enumerate(_flat(grads)):
        g = grad.detach().to(torch.float32)
        if square_sums is not None:
            _flat(square_sums)[i].detach().add_(w * (g * g))
        if sums is not None:
            _flat(sums)[i].detach().add_(w * g)


# ----------------------------------------------------------------- accumulate_per_sample_squares_


def accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """One sample after another, in float64 throughout: ``g = scale G^T X``, ``+= g * g``, ``+= g``.

    The accumulators may be float64 (then nothing is rounded to float32 on the way).
    """
    g, x = grad_output.detach().to(torch.float64), input.detach().to(torch.float64)
    for n, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        gradient = g[begin:end].T @ x[begin:end]
        if scales is not None:
            gradient = gradient * float(scales[n])
        if square_sums is not None:
            square_sums.detach().add_(gradient * gradient)
        if sums is not None:
            sums.detach().add_(gradient)


# ------------------------------------------------------------------------------------- select_topk


def random_scores(seed: int, start: int, n: int) -> Tensor:
    """Uniform [0, 1) of the positions ``start .. start + n - 1``: splitmix64 applied twice."""
    golden = 0x9E3779B97F4A7C15
    z = np.arange(start, start + n, dtype=np.uint64) + np.uint64(seed * golden % 2**64)
    for _ in range(2):  # array arithmetic wraps modulo 2^64, as it must
        z = z + np.uint64(golden)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    top24 = (z >> np.uint64(40)).astype(np.float32)
    return torch.from_numpy(top24 * np.float32(2.0**-24))


def score_values(score: Any) -> Any:
    """The float32 scores that a `Score` stands for, mirrored from its ``first``."""
    first = [t.detach().to(torch.float32) for t in _flat(score.first)]
    second = [t.detach().to(torch.float32) for t in _flat(score.second)] or [torch.empty(0)] * len(
        first
    )
    c = _scalar(score.constant)
    out, start = [], 0
    for a, b in zip(first, second, strict=True):
        if score.kind == "piece-s":
            out.append(a.abs() / _sqrt(b + c))
        elif score.kind == "piece-g":
            out.append(a.abs() / (b + c))
        elif score.kind == "magnitude":
            out.append(a.abs())
        elif score.kind == "snip":
            out.append((a * b).abs())
        elif score.kind == "taylor":
            out.append(a * (b * b))
        elif score.kind == "random":
            out.append(random_scores(score.seed, start, a.numel()).reshape(a.shape))
        else:
            raise ValueError(f"piece_ops.Score: kind must be a known score, got {score.kind!r}")
        start += a.numel()
    return _mirror(score.first, out)


def _select_flat(scores: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, float, int]:
    """The k best allowed positions (increasing), the k-th largest score, its ties taken."""
    position = torch.nonzero(allowed).flatten()
    if not 0 <= k <= position.numel():
        raise ValueError(
            f"piece_ops.select_topk: k must be in 0..{position.numel()} "
            f"(the number of candidates), got {k}"
        )
    if k == 0:
        return torch.empty(0, dtype=torch.int64), math.inf, 0
    value = scores[position] + 0.0  # -0 + 0 is +0
    is_nan = torch.isnan(value)
    real, real_position = value[~is_nan], position[~is_nan]
    best = torch.sort(
        real, descending=True, stable=True
    ).indices  # equal scores: smaller position first
    order = torch.cat(
        [real_position[best], position[is_nan]]
    )  # NaN below -inf, among themselves by position
    chosen = order[:k]
    threshold = float(scores[chosen[-1]] + 0.0)
    taken = scores[chosen]
    ties = torch.isnan(taken) if math.isnan(threshold) else taken == threshold
    return chosen.sort().values, threshold, int(ties.sum())


def select_topk(
    scores: Any,
    k: Any,
    scope: str = "global",
    exclude: Any = None,
    nan: str = "raise",
    *,
    algorithm: str = "auto",
) -> TopK:
    """The k largest by (score, then smaller position in the caller's order); any `algorithm`."""
    if hasattr(scores, "kind"):
        scores = score_values(scores)
    tensors = [t.detach().flatten().to(torch.float64) for t in _flat(scores)]
    if nan == "raise":
        for label, tensor in zip(_labels(scores, "scores"), tensors, strict=True):
            bad = int(torch.isnan(tensor).sum())
            if bad:
                raise ValueError(
                    f"piece_ops.select_topk: {label} must hold no NaN, got {bad} of them"
                )
    allowed = [torch.ones(t.numel(), dtype=torch.bool) for t in tensors]
    if exclude is not None:
        held = [exclude.get(key) for key in scores] if isinstance(exclude, dict) else _flat(exclude)
        for mask, positions in zip(allowed, held, strict=True):
            if positions is not None:
                mask[positions] = False
    if scope == "tensor":
        ks: list[Any] = [k] * len(tensors) if isinstance(k, int) else list(_flat(k))
        rows = [_select_flat(t, a, n) for t, a, n in zip(tensors, allowed, ks, strict=True)]
        return TopK(*(_mirror(scores, [row[field] for row in rows]) for field in range(3)))
    if not tensors:
        return TopK(_mirror(scores, []), math.inf, 0)
    chosen, threshold, ties = _select_flat(torch.cat(tensors), torch.cat(allowed), k)
    ends = torch.tensor([t.numel() for t in tensors]).cumsum(0)
    cuts = torch.searchsorted(chosen, ends).tolist()
    starts = [0, *ends.tolist()]
    pieces = [chosen[a:b] - s for a, b, s in zip([0, *cuts[:-1]], cuts, starts[:-1], strict=True)]
    return TopK(_mirror(scores, pieces), threshold, ties)


def check_topk(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    k: int,
    *,
    first_ties: bool = True,
    chunk: int = 1 << 18,
) -> str | None:
    """Prove or refute a selection without sorting, for arrays too large for `select_topk`.

    The set is right if it has k distinct positions and no score left out exceeds the smallest
    score taken (call it t). With `first_ties`, the scores equal to t that were taken must also be
    the first ones. Scores without NaN, read chunk by chunk (what is made of one stays in the cache:
    a third of the time). None when right, else what is wrong.
    """
    if sum(index.numel() for index in indices) != k:
        return f"{sum(index.numel() for index in indices)} positions instead of {k}"
    taken = [
        t.detach().flatten()[i].to(torch.float64) for t, i in zip(scores, indices, strict=True)
    ]
    if k == 0:
        return None
    t = min(float(v.min()) for v in taken if v.numel())
    above = equal = 0
    ties_wanted = sum(int((v == t).sum()) for v in taken)
    for number, (tensor, index, value) in enumerate(zip(scores, indices, taken, strict=True)):
        if index.numel() and not bool((index[1:] > index[:-1]).all()):
            return f"positions of tensor {number} are not strictly increasing"
        if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= tensor.numel()):
            return f"a position of tensor {number} is out of range"
        tie_positions = index[value == t]
        flat, tie = tensor.detach().flatten(), 0
        for start in range(0, flat.numel(), chunk):
            part = flat[start : start + chunk]  # compared in its own dtype: t is one of its values
            above += int((part > t).count_nonzero())
            if first_ties and equal < ties_wanted:
                here = torch.nonzero(part == t).flatten()[: ties_wanted - equal] + start
                if not torch.equal(here, tie_positions[tie : tie + here.numel()]):
                    return f"tensor {number}: of the scores equal to {t!r} not the first were taken"
                tie += here.numel()
                equal += here.numel()
    if above != k - ties_wanted:
        return f"{above} scores exceed the smallest taken, {t!r}; taken were {k - ties_wanted}"
    return None


# ----------------------------------------------------------------------------------- sparse_adamw_


def adamw_step(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step with decoupled decay: the new (p, m, v) in `dtype` (float32 or float64)."""
    beta1, beta2 = betas
    c = {
        "decay": 1.0 - lr * weight_decay,
        "1-b1": 1.0 - beta1,
        "b2": beta2,
        "1-b2": 1.0 - beta2,
        "rate": lr / (1.0 - beta1**step),
        "root": math.sqrt(1.0 - beta2**step),
        "eps": eps,
    }
    s = {name: _scalar(value, dtype) for name, value in c.items()}
    p, m, v, g = (t.detach().to(dtype) for t in (p, m, v, g))
    p = p * s["decay"]
    m = m + (g - m) * s["1-b1"]
    v = v * s["b2"] + (g * g) * s["1-b2"]
    p = p - s["rate"] * (m / (_sqrt(v) / s["root"] + s["eps"]))
    return p, m, v


def sparse_adamw_(
    weights: Any,
    indices: Any,
    values: Any,
    grads: Any,
    exp_avgs: Any,
    exp_avg_sqs: Any,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """AdamW on the float32 masters ``values``, then ``weights[indices] = round(values)``."""
    lists = [_flat(x) for x in (weights, indices, values, grads, exp_avgs, exp_avg_sqs)]
    for weight, index, value, grad, m, v in zip(*lists, strict=True):
        g = grad.detach().flatten()
        g = g if g.numel() == index.numel() else g[index]
        new = adamw_step(
            value, m, v, g, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        for old, now in zip((value, m, v), new, strict=True):
            old.detach().copy_(now)
        weight.detach().view(-1)[index] = new[0].to(weight.dtype)


# ------------------------------------------------------------------------- gather, scatter_, total


def gather(sources: Any, indices: Any, dtype: torch.dtype | None = None) -> Any:
    """``source.flatten()[index]`` for each pair, in the source's dtype or in `dtype`."""
    pairs = zip(_flat(sources), _flat(indices), strict=True)
    return _mirror(sources, [s.detach().flatten()[i].to(dtype or s.dtype) for s, i in pairs])


def scatter_(targets: Any, indices: Any, values: Any) -> None:
    """``target.view(-1)[index] = value``, rounded to nearest even into the target's dtype."""
    for target, index, value in zip(_flat(targets), _flat(indices), _flat(values), strict=True):
        target.detach().view(-1)[index] = value.detach().flatten().to(target.dtype)


def total(tensors: Any) -> float:
    """The exact sum of all elements, rounded once to float64."""
    return math.fsum(
        x for t in _flat(tensors) for x in t.detach().flatten().to(torch.float64).tolist()
    )


def sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """The entries of ``grad_output.T @ input`` at flat positions, in float64."""
    g = grad_output.detach().flatten(0, -2).double()
    x = input.detach().flatten(0, -2).double()
    return (g.T @ x).flatten()[indices]
