"""CPU tensors: checks, then one call into the extension with addresses and sizes.

Threads: as many as torch uses (``torch.set_num_threads``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops._native import extension
from piece_ops._schema import register


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _sizes(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.numel, tensors))


def _dtypes(tensors: Sequence[Tensor]) -> list[int]:
    """One code for all where they agree: a list of 10,000 costs its conversion."""
    dtypes = list(map(_schema.dtype_of, tensors))
    distinct = dtypes[:1] if len(set(dtypes)) == 1 else dtypes
    return [_schema.DTYPE_CODES[dtype] for dtype in distinct]


@register("accumulate_squares_", "CPU")
def accumulate_squares_(
    square_sums: list[Tensor], grads: list[Tensor], sums: list[Tensor], weight: float
) -> None:
    _schema.check_accumulate_squares_(square_sums, grads, sums, weight)
    tensor, count = extension().accumulate_squares(
        _addresses(square_sums),
        _addresses(sums),
        _addresses(grads),
        _sizes(grads),
        _dtypes(grads),
        weight,
        torch.get_num_threads(),
    )
    if tensor >= 0:
        raise ValueError(
            f"piece_ops.accumulate_squares_: grads[{tensor}] must be finite, got {count} NaN or "
            f"infinite of {grads[tensor].numel()}; nothing was added"
        )
    _schema.bump_versions(square_sums, sums)


@register("select_topk", "CPU")
def select_topk(
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
    _schema.check_select_topk(first, second, k, exclude, score, constant, seed, nan, algorithm)
    by_tensor = len(k) > 1
    sizes = _sizes(first)
    # Checked before the output is allocated: k may be a slip of many gigabytes.
    excluded = _sizes(exclude)
    for t, own_k in enumerate(k):
        parts = slice(t, t + 1) if by_tensor else slice(None)
        candidates = sum(sizes[parts]) - sum(excluded[parts])
        if not 0 <= own_k <= candidates:
            where = f" in scores[{t}]" if by_tensor else ""
            left_out = f", {sum(excluded[parts])} excluded" if exclude else ""
            raise ValueError(
                f"piece_ops.select_topk: k must be in 0..{candidates} (the number of scores"
                f"{where}{left_out}), got {own_k}"
            )
    indices = torch.empty(sum(k), dtype=torch.int64)
    counts = torch.empty(len(first), dtype=torch.int64)
    thresholds, ties_kept, nan_tensor, nan_count, _passes = extension().select_topk(
        _addresses(first),
        sizes,
        _dtypes(first),
        _addresses(second),
        _dtypes(second),
        _addresses(exclude),
        excluded,
        k,
        by_tensor,
        _schema.SCORE_CODES[score],
        constant,
        seed,
        nan == "lowest",
        _schema.ALGORITHM_CODES[algorithm],
        torch.get_num_threads(),
        indices.data_ptr(),
        counts.data_ptr(),
    )
    if nan_tensor >= 0:
        raise ValueError(
            f"piece_ops.select_topk: scores[{nan_tensor}] must not be NaN, got {nan_count} NaN of "
            f"{sizes[nan_tensor]}; nan='lowest' ranks them below everything"
        )
    return (
        indices,
        counts,
        torch.tensor(thresholds, dtype=torch.float64),
        torch.tensor(ties_kept, dtype=torch.int64),
    )


@register("sparse_adamw_", "CPU")
def sparse_adamw_(
    weights: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    numbers = (step, lr, beta1, beta2, eps, weight_decay)
    _schema.check_sparse_adamw_(weights, indices, values, grads, exp_avgs, exp_avg_sqs, *numbers)
    extension().sparse_adamw(
        _addresses(weights),
        _sizes(weights),
        _dtypes(weights),
        _addresses(indices),
        _sizes(indices),
        _addresses(values),
        _addresses(grads),
        _sizes(grads),
        _dtypes(grads),
        _addresses(exp_avgs),
        _addresses(exp_avg_sqs),
        *numbers,
        torch.get_num_threads(),
    )
    _schema.bump_versions(weights, values, exp_avgs, exp_avg_sqs)


@register("gather", "CPU")
def gather(
    sources: list[Tensor], indices: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    _schema.check_gather(sources, indices, dtype)
    values = _schema.new_values(sources, indices, dtype)
    extension().gather(
        _addresses(sources),
        _sizes(sources),
        _dtypes(sources),
        _addresses(indices),
        _sizes(indices),
        _addresses(values),
        _dtypes(values),
        torch.get_num_threads(),
    )
    return values


@register("scatter_", "CPU")
def scatter_(targets: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    _schema.check_scatter_(targets, indices, values)
    extension().scatter(
        _addresses(targets),
        _sizes(targets),
        _dtypes(targets),
        _addresses(indices),
        _sizes(indices),
        _addresses(values),
        _dtypes(values),
        torch.get_num_threads(),
    )
    _schema.bump_versions(targets)


@register("total", "CPU")
def total(tensors: list[Tensor]) -> Tensor:
    _schema.check_total(tensors)
    threads = torch.get_num_threads()
    number = extension().total(_addresses(tensors), _sizes(tensors), _dtypes(tensors), threads)
    return torch.tensor(number, dtype=torch.float64)
