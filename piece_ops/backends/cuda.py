"""CUDA tensors: checks, then one launch over all tensors on the caller's current stream.

Waiting for the device: ``accumulate_squares_`` reads 16 bytes back, which say whether all
gradients were finite (`accumulate` can leave that to the caller); ``sparse_adamw_``, ``gather``,
``scatter_`` and ``sampled_weight_grad`` wait when they see index tensors for the first time (see
``_cuda_runtime.check_indices``). Nothing else waits.

CUDA graphs: every op here can be captured. ``accumulate_squares_`` cannot raise inside a graph: a
replay whose gradients are not all finite adds nothing and counts itself, and the next call outside
a graph on that device raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops._schema import register
from piece_ops.backends import _cuda_runtime, cuda_full_rows
from piece_ops.backends._cuda_runtime import (
    Place,
    Recall,
    check_indices,
    is_checked,
    may_know,
    place_of,
    table_of,
)
from piece_ops.backends._lists import addresses, dtypes, matrix, sizes

# Of sampled_weight_grad, at most, where one block of 256 tokens does not need more: so much
# transposed input stays in the L2 cache of an A100 or later.
SAMPLED_SCRATCH_BYTES = 32 << 20

# What a chunk's maximum can be of; scores by position are not what a maximum bounds.
MAXIMA_SCORES = tuple(name for name in _schema.SCORE_CODES if name != "random")

# Per device: how many replays of captured accumulations added nothing, as the device counts them;
# made by the first call outside a graph, looked at once a graph has been captured.
_skipped_replays: dict[int, Tensor] = {}
_has_captured: set[int] = set()


def _raise_for_skipped_replays(place: Place) -> None:
    if place.index not in _has_captured:
        return
    counter = _skipped_replays[place.index]
    count = int(counter.item())
    if count:
        counter.zero_()
        raise ValueError(
            "piece_ops.accumulate_squares_: gradients must be finite, got NaN or infinite ones in "
            f"{count} replays of a captured CUDA graph since the last call outside one; nothing "
            "was added by those replays, nor by this call"
        )


@register("accumulate_squares_", "CUDA")
def accumulate_squares_(
    square_sums: list[Tensor], grads: list[Tensor], sums: list[Tensor], weight: float
) -> None:
    if (recall := _accumulate_checked(square_sums, grads, sums, weight)[1]) is not None:
        recall.remember()


def accumulate(
    square_sums: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    weight: float,
    *,
    deferred: bool = False,
) -> Tensor | None:
    """``accumulate_squares_``; `deferred`: do not wait, return the report (None: nothing to say).

    Two int64: the first tensor that is not finite (past the last: none), and its count of elements
    that are not (0). Not for a capture, where there is no report.
    """
    return _accumulate_checked(square_sums, grads, sums, weight, deferred=deferred)[0]


def _accumulate_checked(
    square_sums: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    weight: float,
    *,
    deferred: bool = False,
) -> tuple[Tensor | None, Recall | None]:
    """The report, and the recall of lists that were seen for the first time."""
    lists = (square_sums, grads, sums)
    if not grads:
        _schema.check_accumulate_squares_(*lists, weight)
        return None, None
    place = place_of("accumulate_squares_", grads[0])
    recall = Recall(place, lists)
    if recall.table is None:
        _schema.check_accumulate_squares_(*lists, weight)
    else:
        _schema.check_weight(weight)
    report = _accumulate(place, recall, *lists, weight, deferred=deferred)
    _schema.bump_versions(square_sums, sums)
    return report, recall if recall.table is None else None


def accumulate_known(
    square_sums: list[Tensor], grads: list[Tensor], sums: list[Tensor], weight: float
) -> bool:
    """``accumulate_squares_``, if these very tensors came before; else False, nothing is done."""
    lists = (square_sums, grads, sums)
    if not may_know((square_sums or grads)[0]):
        return False
    place = place_of("accumulate_squares_", grads[0])
    recall = Recall(place, lists)
    if not recall.knows_each:
        return False
    _schema.check_weight(weight)
    _accumulate(place, recall, *lists, weight)
    torch.autograd.graph.increment_version(square_sums)
    torch.autograd.graph.increment_version(sums)
    return True


def has_captured(tensor: Tensor) -> bool:
    """Whether an accumulation was captured on this device: replays count no version."""
    return _cuda_runtime.runtime.index(tensor.device) in _has_captured


def accumulate_squares_and_maxima_(
    square_sums: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    weight: float,
    maxima: list[Tensor],
    score: str = "plain",
    second: Sequence[Tensor] = (),
    constant: float = 0.0,
    *,
    deferred: bool = False,
) -> Tensor | None:
    """``accumulate_squares_`` that also leaves the largest score of every 32 elements.

    Parameters
    ----------
    maxima : list of Tensor, float32, contiguous, [(n_t + 31) // 32] each
        Written: element c is the largest score among elements 32 c to 32 c + 31 of tensor t, NaN
        if one of them is NaN. A selection then reads only the chunks that can matter.
    score : str
        One of `MAXIMA_SCORES`: "plain" and "taylor" start from
        the new square_sums, the others from the new sums; "piece-s" takes square_sums as second.
    second : list of Tensor
        For "piece-g", "snip" and "taylor": the second statistic, like ``grads`` in sizes.
    constant : float
        As in ``select_topk``.
    deferred : bool
        As in `accumulate`.
    """
    op = "accumulate_squares_"
    _schema.check_name(op, "score", score, MAXIMA_SCORES)
    code = _schema.SCORE_CODES[score]
    if not grads:
        _check_maxima(square_sums, grads, sums, weight, maxima, second)
        return None
    place = place_of(op, grads[0])
    recall = Recall(place, (square_sums, grads, sums, maxima, second), code)
    if recall.table is None:
        _check_maxima(square_sums, grads, sums, weight, maxima, second)
    else:
        _schema.check_weight(weight)
    report = _accumulate(
        place,
        recall,
        square_sums,
        grads,
        sums,
        weight,
        maxima,
        code,
        second,
        constant,
        deferred=deferred,
    )
    _schema.bump_versions(square_sums, sums, maxima)
    return report


def _check_maxima(
    square_sums: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    weight: float,
    maxima: list[Tensor],
    second: Sequence[Tensor],
) -> None:
    op = "accumulate_squares_"
    _schema.check_accumulate_squares_(square_sums, grads, sums, weight)
    _schema.check_same_count(op, len(grads), maxima=maxima)
    _schema.check_tensors(op, "maxima", maxima, (torch.float32,))
    _schema.check_same_device(op, grads, maxima, list(second))
    for t, (chunk_maxima, grad) in enumerate(zip(maxima, grads, strict=True)):
        if chunk_maxima.numel() != (grad.numel() + 31) // 32:
            raise ValueError(
                f"piece_ops.{op}: maxima[{t}] must have {(grad.numel() + 31) // 32} elements (one "
                f"for 32 gradients), got {chunk_maxima.numel()}"
            )
    if second:
        _schema.check_same_count(op, len(grads), second=second)
        _schema.check_tensors(op, "second", second, _schema.HALVES_AND_FLOAT)
        _schema.check_same_numel(op, "second", second, "grads", grads)


def _accumulate(
    place: Place,
    recall: Recall,
    square_sums: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    weight: float,
    maxima: Sequence[Tensor] = (),
    score: int = 0,
    second: Sequence[Tensor] = (),
    constant: float = 0.0,
    *,
    deferred: bool = False,
) -> Tensor | None:
    if recall.table is None and not any(map(Tensor.numel, grads)):
        return None
    with place.guard:
        capturing = place.capturing
        if place.index not in _skipped_replays:
            if capturing:
                raise RuntimeError(
                    "piece_ops.accumulate_squares_: must have run once on this device before a "
                    "CUDA graph is captured; call it once outside the graph first"
                )
            _skipped_replays[place.index] = torch.zeros(1, dtype=torch.int64, device=place.device)
        if capturing:
            _has_captured.add(place.index)
        else:
            _raise_for_skipped_replays(place)
        table = recall.table
        if table is None:
            columns = (
                addresses(square_sums),
                addresses(sums),
                addresses(grads),
                sizes(grads),
                dtypes(grads),
                addresses(maxima),
                [score],
                addresses(second),
                dtypes(second),
            )
            table = table_of(place, _make_accumulate_table(place), *columns, key=recall.key)
        report = torch.empty(2, dtype=torch.int64, device=place.device)
        place.module.cuda_accumulate_squares(
            *table.pair,
            bool(square_sums),
            bool(sums),
            weight,
            report.data_ptr(),
            _skipped_replays[place.index].data_ptr() if capturing else 0,
            *place.where,
            bool(maxima),
            score,
            constant,
        )
        if not capturing and not deferred:
            tensor, count = place.read(report)
            if tensor < len(grads):
                raise ValueError(
                    f"piece_ops.accumulate_squares_: grads[{tensor}] must be finite, got {count} "
                    f"NaN or infinite of {grads[tensor].numel()}; nothing was added"
                )
    return report if deferred and not capturing else None


def _make_accumulate_table(place: Place) -> Any:
    def make(*columns: Sequence[int]) -> Any:
        *before, score, second, second_dtypes = columns
        return place.module.cuda_accumulate_squares_table(*before, score[0], second, second_dtypes)

    return make


def adamw_table(
    place: Place,
    weights: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
) -> Any:
    """The table of these tensors, their indices checked."""
    weight_sizes = sizes(weights)
    table = table_of(
        place,
        place.module.cuda_sparse_adamw_table,
        addresses(weights),
        weight_sizes,
        dtypes(weights),
        addresses(indices),
        sizes(indices),
        addresses(values),
        addresses(grads),
        sizes(grads),
        dtypes(grads),
        addresses(exp_avgs),
        addresses(exp_avg_sqs),
    )
    check_indices(place, table, indices, weight_sizes)
    return table


@register("sparse_adamw_", "CUDA")
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
    lists = (weights, indices, values, grads, exp_avgs, exp_avg_sqs)
    numbers = (step, lr, beta1, beta2, eps, weight_decay)
    _schema.check_sparse_adamw_(*lists, *numbers)
    if any(map(Tensor.numel, indices)):
        place = place_of("sparse_adamw_", weights[0])
        with place.guard:
            table = adamw_table(place, *lists)
            place.module.cuda_sparse_adamw(*table.pair, *numbers, *place.where)
    _schema.bump_versions(weights, values, exp_avgs, exp_avg_sqs)


@register("gather", "CUDA")
def gather(
    sources: list[Tensor], indices: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    _schema.check_gather(sources, indices, dtype)
    values = _schema.new_values(sources, indices, dtype)
    if any(map(Tensor.numel, indices)):
        place = place_of("gather", sources[0])
        with place.guard:
            _over_slots(place, "gather", sources, indices, values)
    return values


@register("scatter_", "CUDA")
def scatter_(targets: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    _schema.check_scatter_(targets, indices, values)
    if any(map(Tensor.numel, indices)):
        place = place_of("scatter_", targets[0])
        with place.guard:
            _over_slots(place, "scatter", targets, indices, values)
    _schema.bump_versions(targets)


def _over_slots(
    place: Place,
    name: str,
    dense: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
) -> None:
    """Gather or scatter between dense tensors and values at indices."""
    dense_sizes = sizes(dense)
    table = table_of(
        place,
        getattr(place.module, f"cuda_{name}_table"),
        addresses(dense),
        dense_sizes,
        dtypes(dense),
        addresses(indices),
        sizes(indices),
        addresses(values),
        dtypes(values),
    )
    check_indices(place, table, indices, dense_sizes)
    getattr(place.module, f"cuda_{name}")(*table.pair, *place.where)


@register("total", "CUDA")
def total(tensors: list[Tensor]) -> Tensor:
    _schema.check_total(tensors)
    place = place_of("total", tensors[0])
    with place.guard:
        table = table_of(
            place,
            place.module.cuda_total_table,
            addresses(tensors),
            sizes(tensors),
            dtypes(tensors),
        )
        result = torch.empty([], dtype=torch.float64, device=place.device)
        tile_sums = torch.empty(table.handle.tiles, dtype=torch.float64, device=place.device)
        place.module.cuda_total(*table.pair, tile_sums.data_ptr(), result.data_ptr(), *place.where)
    return result


@register("sampled_weight_grad", "CUDA")
def sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    _schema.check_sampled_weight_grad(grad_output, input, indices)
    tokens, count = grad_output.shape[0], indices.numel()
    values = grad_output.new_zeros(count, dtype=torch.float32)
    if not count:
        return values
    place = place_of("sampled_weight_grad", grad_output)
    columns = (grad_output.shape[1], input.shape[1])
    bound = columns[0] * columns[1]
    with place.guard:
        if indices.is_inference() or not is_checked(indices, bound):
            make = place.module.cuda_sampled_weight_grad_table
            table = table_of(place, make, [indices.data_ptr()], [count], columns)
            check_indices(place, table, [indices], [bound])
        if not tokens:
            return values
        full = None
        if grad_output.dtype == input.dtype:
            size = grad_output.element_size()
            full = cuda_full_rows.plan(indices, columns, size, place.capturing)
        if full is None:
            _one_by_one(place, grad_output, input, indices, values)
            return values
        cuda_full_rows.fill(values, grad_output, input, full)
        if full.rest.numel():
            rest = torch.empty_like(full.rest, dtype=torch.float32)
            _one_by_one(place, grad_output, input, full.rest, rest)
            values.index_copy_(0, full.rest_slots, rest)
    return values


def _one_by_one(
    place: Place, grad_output: Tensor, input: Tensor, indices: Tensor, values: Tensor
) -> None:
    tokens, count = grad_output.shape[0], indices.numel()
    n_bytes = place.module.cuda_sampled_weight_grad_bytes(matrix(input), count)
    blocks = max(1, min(-(-tokens // 256), SAMPLED_SCRATCH_BYTES // n_bytes))
    scratch = torch.empty(blocks * n_bytes, dtype=torch.uint8, device=place.device)
    place.module.cuda_sampled_weight_grad(
        matrix(grad_output),
        matrix(input),
        tokens,
        indices.data_ptr(),
        count,
        values.data_ptr(),
        scratch.data_ptr(),
        blocks,
        *place.where,
    )
