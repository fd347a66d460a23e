"""CPU tensors: checks, then one call into the extension with addresses and sizes.

Threads: as many as torch uses (``torch.set_num_threads``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops._native import extension
from piece_ops._schema import register
from piece_ops.backends._lists import addresses, dtypes, matrix, sizes


@register("accumulate_squares_", "CPU")
def accumulate_squares_(
    square_sums: list[Tensor], grads: list[Tensor], sums: list[Tensor], weight: float
) -> None:
    _schema.check_accumulate_squares_(square_sums, grads, sums, weight)
    tensor, count = extension().accumulate_squares(
        addresses(square_sums),
        addresses(sums),
        addresses(grads),
        sizes(grads),
        dtypes(grads),
        weight,
        torch.get_num_threads(),
    )
    if tensor >= 0:
        raise ValueError(
            f"piece_ops.accumulate_squares_: grads[{tensor}] must be finite, got {count} NaN or "
            f"infinite of {grads[tensor].numel()}; nothing was added"
        )
    _schema.bump_versions(square_sums, sums)


@register("accumulate_per_sample_squares_", "CPU")
def accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    add_per_sample_squares(square_sums, grad_output, input, offsets, sums, scales)


def add_per_sample_squares(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None,
    scales: Tensor | None,
) -> bool:
    """``accumulate_per_sample_squares_``; whether an accumulator is not finite afterwards.

    The op sees every number that it writes, so that nobody has to read them again to know.
    """
    tensors = (square_sums, grad_output, input, offsets, sums, scales)
    _schema.check_accumulate_per_sample_squares_(*tensors)
    offsets = offsets.contiguous()
    scales = None if scales is None else scales.contiguous()
    _schema.check_offsets(offsets, grad_output.shape[0], scales)
    matrices = [
        [x.data_ptr(), x.shape[1], x.stride(0), _schema.DTYPE_CODES[x.dtype]]
        for x in (grad_output, input)
    ]
    tensor, count, overflowed = extension().accumulate_per_sample_squares(
        *(0 if square_sums is None else square_sums.data_ptr(), *matrices),
        offsets.data_ptr(),
        offsets.numel() - 1,
        *(0 if x is None else x.data_ptr() for x in (sums, scales)),
        torch.get_num_threads(),
    )
    _schema.raise_for_nonfinite_factor(grad_output, input, tensor, count)
    _schema.bump_versions([x for x in (square_sums, sums) if x is not None])
    return bool(overflowed)


def add_rounded_(target: Tensor, value: Tensor, key: int, begin: int) -> bool:
    """``target += value``, bfloat16 and float32, contiguous, of one size; rounded at random.

    By a hash of `key` and of positions from `begin` on. Whether a sum is not finite afterwards.
    """
    overflowed = extension().add_rounded(
        target.data_ptr(), value.data_ptr(), target.numel(), key, begin, torch.get_num_threads()
    )
    _schema.bump_versions([target])
    return bool(overflowed)


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
    numels = sizes(first)
    excluded = sizes(exclude)
    _schema.check_k(k, numels, excluded)
    indices = torch.empty(sum(k), dtype=torch.int64)
    counts = torch.empty(len(first), dtype=torch.int64)
    thresholds = torch.empty(len(k), dtype=torch.float64)
    ties_kept = torch.empty(len(k), dtype=torch.int64)
    nan_tensor, nan_count = extension().select_topk(
        addresses(first),
        numels,
        dtypes(first),
        addresses(second),
        dtypes(second),
        addresses(exclude),
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
        thresholds.data_ptr(),
        ties_kept.data_ptr(),
    )
    if nan_tensor >= 0:
        raise ValueError(
            f"piece_ops.select_topk: scores[{nan_tensor}] must not be NaN, got {nan_count} NaN of "
            f"{numels[nan_tensor]}; nan='lowest' ranks them below everything"
        )
    return indices, counts, thresholds, ties_kept


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
        addresses(weights),
        sizes(weights),
        dtypes(weights),
        addresses(indices),
        sizes(indices),
        addresses(values),
        addresses(grads),
        sizes(grads),
        dtypes(grads),
        addresses(exp_avgs),
        addresses(exp_avg_sqs),
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
        addresses(sources),
        sizes(sources),
        dtypes(sources),
        addresses(indices),
        sizes(indices),
        addresses(values),
        dtypes(values),
        torch.get_num_threads(),
    )
    return values


@register("scatter_", "CPU")
def scatter_(targets: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    _schema.check_scatter_(targets, indices, values)
    extension().scatter(
        addresses(targets),
        sizes(targets),
        dtypes(targets),
        addresses(indices),
        sizes(indices),
        addresses(values),
        dtypes(values),
        torch.get_num_threads(),
    )
    _schema.bump_versions(targets)


@register("total", "CPU")
def total(tensors: list[Tensor]) -> Tensor:
    _schema.check_total(tensors)
    threads = torch.get_num_threads()
    number = extension().total(addresses(tensors), sizes(tensors), dtypes(tensors), threads)
    return torch.tensor(number, dtype=torch.float64)


@register("sampled_weight_grad", "CPU")
def sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    _schema.check_sampled_weight_grad(grad_output, input, indices)
    count = indices.numel()
    values = torch.empty(count, dtype=torch.float32)
    extension().sampled_weight_grad(
        matrix(grad_output),
        matrix(input),
        grad_output.shape[0],
        indices.data_ptr(),
        count,
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return values
