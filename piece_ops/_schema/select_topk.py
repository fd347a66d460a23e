"""select_topk: schema, checker, fake kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piece_ops._schema.checks import (
    FLOATS,
    HALVES_AND_FLOAT,
    check_indices,
    check_name,
    check_same_count,
    check_same_device,
    check_same_numel,
    check_tensors,
    name_dtypes,
)
from piece_ops._schema.library import LIBRARY, register_fake

# The numbers of csrc/include/piece_ops: math/score.h, ops/select_topk.h.
SCORE_CODES = {
    "plain": 0,
    "piece-s": 1,
    "piece-g": 2,
    "magnitude": 3,
    "snip": 4,
    "taylor": 5,
    "random": 6,
}
SCORES_WITH_SECOND = ("piece-s", "piece-g", "snip", "taylor")
ALGORITHM_CODES = {"auto": 0, "filter": 1, "radix": 2}
NAN_RULES = ("raise", "lowest")

LIBRARY.define(
    "select_topk(Tensor[] first, Tensor[] second, SymInt[] k, Tensor[] exclude, str score, "
    "float constant, int seed, str nan, str algorithm) "
    "-> (Tensor indices, Tensor counts, Tensor thresholds, Tensor ties_kept)"
)


def check_select_topk(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    k: Sequence[int],
    exclude: Sequence[Tensor],
    score: str,
    constant: float,
    seed: int,
    nan: str,
    algorithm: str,
) -> None:
    """One k: over all tensors together; else one k for each tensor. exclude may be empty."""
    op = "select_topk"
    check_name(op, "score", score, SCORE_CODES)
    check_name(op, "nan", nan, NAN_RULES)
    check_name(op, "algorithm", algorithm, ALGORITHM_CODES)
    if not 0 <= constant < float("inf"):
        raise ValueError(
            f"piece_ops.{op}: constant must be finite and not negative, got {constant}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"piece_ops.{op}: seed must be in 0..2^63-1, got {seed}")
    dtypes = check_tensors(op, "scores", first, FLOATS if score == "plain" else HALVES_AND_FLOAT)
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise TypeError(
            f"piece_ops.{op}: scores must be all float64 or none, got {name_dtypes(dtypes)}"
        )
    if score in SCORES_WITH_SECOND:
        check_same_count(op, len(first), second=second)
        check_tensors(op, "second", second, HALVES_AND_FLOAT)
        check_same_numel(op, "second", second, "first", first)
    elif second:
        raise ValueError(f"piece_ops.{op}: score {score!r} takes no second statistic, got one")
    if len(k) not in (1, len(first)):
        raise ValueError(
            f"piece_ops.{op}: k must be one number, or one for each of the {len(first)} tensors, "
            f"got {len(k)}"
        )
    if exclude:
        check_same_count(op, len(first), exclude=exclude)
        check_indices(op, exclude, "exclude")
    check_same_device(op, first, second, exclude)


def check_k(k: Sequence[int], sizes: Sequence[int], excluded: Sequence[int]) -> None:
    """Check each k against its candidates, before the output of that size is allocated."""
    by_tensor = len(k) > 1
    for t, own_k in enumerate(k):
        parts = slice(t, t + 1) if by_tensor else slice(None)
        candidates = sum(sizes[parts]) - sum(excluded[parts])
        if not 0 <= own_k <= candidates:
            where = f" in scores[{t}]" if by_tensor else ""
            left_out = f", {sum(excluded[parts])} excluded" if excluded else ""
            raise ValueError(
                f"piece_ops.select_topk: k must be in 0..{candidates} (the number of scores"
                f"{where}{left_out}), got {own_k}"
            )


@register_fake("select_topk")
def _fake_select_topk(
    first: list[Tensor],
    second: list[Tensor],
    k: list[int],
    exclude: list[Tensor],
    score: str,
    constant: float,
    seed: int,
    nan: str,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_select_topk(first, second, k, exclude, score, constant, seed, nan, algorithm)
    like = first[0]
    # The CUDA backend reads these anyway when it reads its report; they stay on the host.
    device = "cpu" if like.device.type == "cuda" else like.device
    return (
        like.new_empty([sum(k)], dtype=torch.int64),
        like.new_empty([len(first)], dtype=torch.int64, device=device),
        like.new_empty([len(k)], dtype=torch.float64, device=device),
        like.new_empty([len(k)], dtype=torch.int64, device=device),
    )
