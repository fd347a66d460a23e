"""select_topk on CUDA tensors: launches on the current stream, and one look at their report.

Waiting for the device: once, to read the report (threshold, ties, NaN, and whether the bound held);
once more for each further way that has to be tried, which is one selection in a thousand, or with
scores made to mislead the sample. ``counts``, ``thresholds`` and ``ties_kept`` come with the report
and are returned on the host. Algorithm and traffic: ``csrc/cuda/select_topk.cu``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops._schema import register
from piece_ops.backends._cuda_runtime import Place, place_of, table_of
from piece_ops.backends._lists import addresses, dtypes, sizes

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
    return select_topk_by_maxima(
        first, second, k, exclude, score, constant, seed, nan, algorithm, []
    )


def select_topk_by_maxima(
    first: list[Tensor],
    second: list[Tensor],
    k: list[int],
    exclude: list[Tensor],
    score: str,
    constant: float,
    seed: int,
    nan: str,
    algorithm: str,
    maxima: list[Tensor],
    ways: list[str] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``select_topk`` that reads only the chunks of 32 scores whose maximum can matter.

    Parameters
    ----------
    first, second, k, exclude, score, constant, seed, nan, algorithm
        As for ``torch.ops.piece_ops.select_topk``.
    maxima : list of Tensor, float32, contiguous, [(n_t + 31) // 32] each
        What ``accumulate_squares_and_maxima_`` left for this score; empty: read everything. Used
        by a selection over all tensors of float32, bfloat16 or float16. **Unchecked:** that they
        are the maxima of these scores; one that is too small hides its chunk.
    ways : list of str, optional
        Filled with the ways that were tried, out of `WAYS`, in turn.

    Returns
    -------
    indices, counts, thresholds, ties_kept : Tensor
        The first on the device, the others on the host.
    """
    op = "select_topk"
    _schema.check_select_topk(first, second, k, exclude, score, constant, seed, nan, algorithm)
    _check_maxima(first, maxima)
    by_tensor = len(k) > 1
    numels, excluded = sizes(first), sizes(exclude)
    _schema.check_k(k, numels, excluded)
    place = place_of(op, first[0])
    if place.capturing:
        raise RuntimeError(
            f"piece_ops.{op}: must be called outside a CUDA graph's capture, got a capturing "
            "stream: the host reads the report to raise for NaN and to know the counts"
        )
    call = place.module.CudaSelectTopk
    words = place.module.TOPK_REPORT_WORDS
    if not by_tensor and len(first) == 1 and algorithm == "auto" and not maxima:
        by_tensor = numels[0] <= place.module.SMALL_TOPK  # one launch, by one block
    scopes = len(k)
    with place.guard:
        columns: list[Sequence[int]] = [
            addresses(first),
            numels,
            dtypes(first),
            addresses(second),
            dtypes(second),
            addresses(exclude),
            excluded,
            addresses(maxima),
            k,
        ]
        codes = (
            by_tensor,
            _schema.SCORE_CODES[score],
            constant,
            seed,
            nan == "lowest",
            _schema.ALGORITHM_CODES[algorithm],
        )
        selection = call(*columns, *codes)
        indices = _empty(place, sum(k))
        # The reports, then the counts: what the host reads, in one copy.
        results = _empty(place, scopes * words + len(first))
        if not any(k):
            results.zero_()
        # What the table depends on; k only where every tensor has its own row's.
        key = [*columns[:8], k if by_tensor else [], [by_tensor, _schema.SCORE_CODES[score]]]
        table = table_of(place, lambda *_: selection.table(), *key)
        check = _check_excluded(place, selection) if any(excluded) else None
        check_address = 0 if check is None else check.data_ptr()
        at = results.data_ptr()
        outputs = (at, indices.data_ptr(), at + 8 * scopes * words)
        before = (table.words.data_ptr(), check_address)
        where = place.where
        if by_tensor:
            selection.small_launch(*before, *outputs, *where)
        pending = {scope: list(selection.ways(scope)) for scope in selection.large_scopes()}
        while True:
            for scope, left in pending.items():
                way = left.pop(0)
                if ways is not None:
                    ways.append(WAYS[way])
                scratch = _empty(place, (selection.scratch_bytes(scope, way) + 7) // 8)
                selection.launch(scope, way, *before, scratch.data_ptr(), *outputs, *where)
                del scratch  # the allocator hands it out again in this stream's order
            host = results.cpu()
            reports = _reports(host, scopes, words)
            pending = {s: left for s, left in pending.items() if reports[s].status == MISSED}
            if not pending:
                break
            if not all(pending.values()):
                raise RuntimeError(f"piece_ops.{op}: the digits' bound missed")
    _raise_for(reports, check, exclude, numels, selection, by_tensor)
    if not by_tensor and k == [0]:
        reports[0].threshold = float("inf")
    return (
        indices,
        host[scopes * words :],
        torch.tensor([report.threshold for report in reports], dtype=torch.float64),
        torch.tensor([report.ties_kept for report in reports], dtype=torch.int64),
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


def _reports(host: Tensor, scopes: int, words: int) -> list[Report]:
    table = host.numpy()[: scopes * words].reshape(scopes, words)  # by NumPy: a call costs less
    thresholds = table[:, 0].copy().view("float64").tolist()
    return [
        Report(threshold, *numbers)
        for threshold, numbers in zip(thresholds, table[:, 1:].tolist(), strict=True)
    ]


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
