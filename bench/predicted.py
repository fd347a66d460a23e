"""What the cost model of ``piece_ops.predict`` says about a row, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from piece_ops.predict import Device, costs, devices
from piece_ops.predict.costs import Work

MASKED = "torch: mask gradients, AdamW(fused)"


def milliseconds(line: dict[str, Any], gb_per_s: float | None, gflop_per_s: float) -> float | None:
    """Predicted time of a row on a CPU with this bandwidth; None where there is no model."""
    if gb_per_s is None:
        return None
    # How much memory there is changes no time.
    on = devices.cpu(0.0, gb_per_s * 1e9, gflop_per_s * 1e9, "measured in the same run")
    work = work_of(line, on)
    return None if work is None else work.seconds(on) * 1e3


def work_of(line: dict[str, Any], on: Device) -> Work | None:
    """The work of a row by its op (in a sweep: its kernel), peer and sizes."""
    op, peer = line.get("kernel", line["op"]), line.get("series", line["peer"])
    n, tensors = line["n"], line.get("tensors", 1)
    k = line.get("k") or n // 1000
    if (op, peer) == ("select_topk", "piece_ops"):
        return costs.select_topk(n, k, line["bytes"] / n, on, tensors)
    made: dict[tuple[str, str], Work] = {
        ("accumulate_squares_", "piece_ops"): costs.accumulate_squares(n, 2, 1, tensors),
        ("accumulate_squares_", "piece_ops, squares and sums"): costs.accumulate_squares(
            n, 2, 2, tensors
        ),
        ("sparse_adamw_", "piece_ops"): costs.sparse_adamw(k, on, tensors, True),
        ("sparse_adamw_", "piece_ops, compact gradients"): costs.sparse_adamw(k, on, tensors),
        ("sparse_adamw_", MASKED): costs.masked_adamw(n, 4),
        ("gather", "piece_ops"): costs.gather(k, 4, on, tensors),
        ("scatter_", "piece_ops"): costs.scatter(k, 4, on, tensors),
        ("total", "piece_ops"): costs.total(n, 4, tensors),
    }
    if "tokens" in line:
        tokens, out, width = line["tokens"], line["out"], line["width"]
        made["accumulate_per_sample_squares_", "piece_ops"] = costs.accumulate_per_sample_squares(
            tokens, out, width, 4, 1, on
        )
        made["sampled_weight_grad", "piece_ops"] = costs.sampled_weight_grad(
            tokens, out, width, 4, k, on
        )
    return made.get((op, peer))


def ratios(lines: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Predicted over measured time of the rows of one case that the model knows."""
    timed = [line for line in lines if line["kind"] == "row" and "p50_ms" in line]
    for line in timed:
        floors = [
            other["gb_per_s"]
            for other in timed
            if other["role"] == "floor" and other.get("x") == line.get("x")
        ]
        rate = line.get("gflop_per_s", 100.0)  # older rows do not say; no op of theirs multiplies
        if (ms := milliseconds(line, max(floors, default=None), rate)) is not None:
            yield line, ms / line["p50_ms"]
