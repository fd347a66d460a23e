"""select_topk on CUDA tensors: launches on the current stream, and one look at their report.

Waiting for the device: once, to read the report (threshold, ties, NaN, and whether the bound held);
once more for each further way that has to be tried, which is one selection in a thousand, or with
scores made to mislead the sample. ``counts``, ``thresholds`` and ``ties_kept`` come with the report
and are returned on the host. Algorithm and traffic: ``csrc/cuda/select_topk.cu``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops._schema import register
from piece_ops.backends._cuda_runtime import (
    Place,
    Recall,
    Table,
    may_know,
    place_of,
    table_of,
)
from piece_ops.backends._lists import addresses, dtypes, sizes

PLANS_KEPT = 8  # over one table: other k, constants and rules
CHUNK = 32  # elements under one maximum
FOUND, MISSED, NAN, BROKEN = range(4)  # csrc/include/piece_ops/ops/select_topk.h, TopkReport
WAYS = ("sample", "maxima", "digits", "resample")  # numbered as TopkWay


@dataclass
class Report:
    """What one selection left behind."""

    threshold: float
    ties_kept: int
    status: int
    nan_tensor: int
    nan_count: int
    kept: int
    ties: int
    check: int


@dataclass
class Found:
    """What ``torch.ops.piece_ops.select_topk`` returns, on the host but for the positions."""

    indices: Tensor
    counts: list[int]
    thresholds: list[float]
    ties_kept: list[int]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same as tensors."""
        return (
            self.indices,
            torch.tensor(self.counts, dtype=torch.int64),
            torch.tensor(self.thresholds, dtype=torch.float64),
            torch.tensor(self.ties_kept, dtype=torch.int64),
        )


class Arguments(NamedTuple):
    """Of ``torch.ops.piece_ops.select_topk``, and what accumulations have left of the scores.

    Attributes
    ----------
    maxima : list of Tensor, float32, contiguous, [(n_t + 31) // 32] each
        What ``accumulate_squares_and_maxima_`` left for this score; empty: read everything. Used
        by a selection over all tensors of float32, bfloat16 or float16. **Unchecked:** that they
        are the maxima of these scores; one that is too small hides its chunk.
    """

    first: list[Tensor]
    second: list[Tensor]
    k: list[int]
    exclude: list[Tensor]
    score: str
    constant: float
    seed: int
    nan: str
    algorithm: str
    maxima: list[Tensor]

    def check(self) -> None:
        _schema.check_select_topk(*self[:-1])
        _check_maxima(self.first, self.maxima)


@dataclass
class _Plan:
    """A selection that was checked and laid out: over its table, nothing else can differ."""

    selection: Any
    table: Table
    numels: list[int]
    k: list[int]
    by_tensor: bool
    has_exclude: bool
    ways: dict[int, list[int]]  # of each scope that `launch` is for
    scratch_words: int  # of any scope's first way


@register("select_topk", "CUDA")
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
    given = Arguments(first, second, k, exclude, score, constant, seed, nan, algorithm, [])
    place = _place_of(given)
    plan, recall = _plan_of(place, given)
    results = _run(place, plan, exclude).tensors()
    if recall is not None:
        recall.remember()
    return results


def select(given: Arguments, ways: list[str] | None = None) -> Found:
    """Select; with `maxima` read only the chunks of 32 scores whose maximum can matter.

    Parameters
    ----------
    given : Arguments
    ways : list of str, optional
        Filled with the ways that were tried, out of `WAYS`, in turn.
    """
    place = _place_of(given)
    plan, _ = _plan_of(place, given)
    return _run(place, plan, given.exclude, ways)


def select_known(given: Arguments) -> Found | None:
    """`select`, if these very tensors came before, without maxima; else None."""
    if not may_know(given.first[0]):
        return None
    place = _place_of(given)
    recalled = _recall(place, given)
    if not recalled[0].knows_each:
        return None
    plan, _ = _plan_of(place, given, recalled)
    return _run(place, plan, given.exclude)


def _place_of(given: Arguments) -> Place:
    if not given.first:
        given.check()
    return place_of("select_topk", given.first[0])


def _recall(place: Place, given: Arguments) -> tuple[Recall, bool, Any]:
    """The recall of a selection's lists; whether it is by tensor; the key of its plan."""
    if place.capturing:
        raise RuntimeError(
            f"piece_ops.{place.op}: must be called outside a CUDA graph's capture, got a capturing "
            "stream: the host reads the report to raise for NaN and to know the counts"
        )
    first, k = given.first, tuple(given.k)
    by_tensor = len(k) > 1
    if not by_tensor and len(first) == 1 and given.algorithm == "auto" and not given.maxima:
        by_tensor = first[0].numel() <= place.module.SMALL_TOPK  # one launch, by one block
    # What the table depends on; k only where every tensor has its own row's.
    of_table = (by_tensor, given.score, k if by_tensor else ())
    recall = Recall(place, (first, given.second, given.exclude, given.maxima), of_table)
    return recall, by_tensor, (k, given.constant, given.seed, given.nan, given.algorithm)


def _plan_of(
    place: Place, given: Arguments, recalled: tuple[Recall, bool, Any] | None = None
) -> tuple[_Plan, Recall | None]:
    """The plan that is kept, or a new one; with the recall if the lists were new."""
    recall, by_tensor, key = recalled or _recall(place, given)
    table = recall.table
    if table is not None and key in table.plans:
        return table.plans[key], None
    given.check()
    k = given.k
    numels, excluded = sizes(given.first), sizes(given.exclude)
    _schema.check_k(k, numels, excluded)
    columns: list[Sequence[int]] = [
        addresses(given.first),
        numels,
        dtypes(given.first),
        addresses(given.second),
        dtypes(given.second),
        addresses(given.exclude),
        excluded,
        addresses(given.maxima),
    ]
    code = _schema.SCORE_CODES[given.score]
    rules = (given.nan == "lowest", _schema.ALGORITHM_CODES[given.algorithm])
    formula = (code, given.constant, given.seed)
    selection = place.module.CudaSelectTopk(*columns, k, by_tensor, *formula, *rules)
    with place.guard:
        of_table = [*columns, k if by_tensor else [], [by_tensor, code]]
        made = table or table_of(place, lambda *_: selection.table(), *of_table, key=recall.key)
    ways = {scope: list(selection.ways(scope)) for scope in selection.large_scopes()}
    n_bytes = max((selection.scratch_bytes(s, tried[0]) for s, tried in ways.items()), default=0)
    plan = _Plan(selection, made, numels, k, by_tensor, any(excluded), ways, (n_bytes + 7) // 8)
    if recall.key is not None:
        if len(made.plans) >= PLANS_KEPT:
            made.plans.clear()
        made.plans[key] = plan
    return plan, recall if table is None else None


def _run(place: Place, plan: _Plan, exclude: list[Tensor], ways: list[str] | None = None) -> Found:
    """Launch, read the report, launch again what missed."""
    selection, by_tensor = plan.selection, plan.by_tensor
    scopes, words = len(plan.k), place.module.TOPK_REPORT_WORDS
    with place.guard:
        where = place.where
        # The reports, then the counts, which the host reads in one copy; then scratch.
        n_results = scopes * words + len(plan.numels)
        begin_scratch = (n_results + 1) // 2 * 2  # at a multiple of 16 bytes
        memory = _empty(place, begin_scratch + plan.scratch_words)
        results = memory[:n_results]
        indices = _empty(place, sum(plan.k))
        if not any(plan.k):
            results.zero_()
        check = _check_excluded(place, selection) if plan.has_exclude else None
        check_address = 0 if check is None else check.data_ptr()
        at = memory.data_ptr()
        outputs = (at, indices.data_ptr(), at + 8 * scopes * words)
        before = (plan.table.words.data_ptr(), check_address)
        scratch_at = at + 8 * begin_scratch
        if by_tensor:
            selection.small_launch(*before, *outputs, *where)
        pending = {scope: list(left) for scope, left in plan.ways.items()}
        is_first = True
        while True:
            for scope, left in pending.items():
                way = left.pop(0)
                if ways is not None:
                    ways.append(WAYS[way])
                scratch = None
                if not is_first:
                    scratch = _empty(place, (selection.scratch_bytes(scope, way) + 7) // 8)
                    scratch_at = scratch.data_ptr()
                selection.launch(scope, way, *before, scratch_at, *outputs, *where)
                del scratch  # the allocator hands it out again in this stream's order
            is_first = False
            numbers = place.read(results)
            reports = _reports(numbers, scopes, words)
            pending = {s: left for s, left in pending.items() if reports[s].status == MISSED}
            if not pending:
                break
            if not all(pending.values()):
                raise RuntimeError(f"piece_ops.{place.op}: the digits' bound missed")
    _raise_for(reports, check, exclude, plan.numels, selection, by_tensor)
    if not by_tensor and plan.k == [0]:
        reports[0].threshold = float("inf")
    return Found(
        indices,
        numbers[scopes * words :],
        [report.threshold for report in reports],
        [report.ties_kept for report in reports],
    )


def _check_maxima(first: list[Tensor], maxima: list[Tensor]) -> None:
    op = "select_topk"
    if not maxima:
        return
    _schema.check_same_count(op, len(first), maxima=maxima)
    _schema.check_tensors(op, "maxima", maxima, (torch.float32,))
    _schema.check_same_device(op, first, maxima)
    for t, (chunk_maxima, tensor) in enumerate(zip(maxima, first, strict=True)):
        wanted = (tensor.numel() + CHUNK - 1) // CHUNK
        if chunk_maxima.numel() != wanted:
            raise ValueError(
                f"piece_ops.{op}: maxima[{t}] must have {wanted} elements (one for {CHUNK} "
                f"scores), got {chunk_maxima.numel()}"
            )


def _empty(place: Place, words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64, device=place.device)


def _check_excluded(place: Place, selection: Any) -> Tensor:
    """Launch the look at the excluded positions; its report is read by the kernels, then here."""
    handle = selection.exclude_table()
    words = _empty(place, handle.n_bytes // 8)
    report = _empty(place, 1)
    handle.write(words.data_ptr(), *place.where)
    place.module.cuda_check_indices(handle, words.data_ptr(), report.data_ptr(), *place.where)
    return report


def _reports(numbers: list[int], scopes: int, words: int) -> list[Report]:
    parts = [numbers[begin : begin + words] for begin in range(0, scopes * words, words)]
    thresholds = struct.unpack(f"{scopes}d", struct.pack(f"{scopes}q", *(x[0] for x in parts)))
    return [Report(t, *x[1:]) for t, x in zip(thresholds, parts, strict=True)]


def _raise_for(
    reports: list[Report],
    check: Tensor | None,
    exclude: list[Tensor],
    numels: list[int],
    selection: Any,
    by_tensor: bool,
) -> None:
    """Excluded positions that are wrong, then the first tensor with NaN."""
    for scope, report in enumerate(reports):
        if report.status == BROKEN and check is not None:
            t, slot = selection.exclude_table().locate(report.check)
            i, n = int(exclude[t][slot]), numels[t]
            where = f"piece_ops.select_topk: exclude[{t}] must be"
            if not 0 <= i < n:
                raise ValueError(f"{where} in 0..{n - 1}, got {i} at slot {slot}")
            previous = int(exclude[t][slot - 1])
            raise ValueError(
                f"{where} strictly increasing, got {i} after {previous} at slot {slot}"
            )
        if report.status == NAN:
            t = scope if by_tensor else report.nan_tensor
            raise ValueError(
                f"piece_ops.select_topk: scores[{t}] must not be NaN, got {report.nan_count} NaN "
                f"of {numels[t]}; nan='lowest' ranks them below everything"
            )
