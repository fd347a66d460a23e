"""What the cost model of ``piece_ops.predict`` says about a row, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from piece_ops.predict import Device, Model, Plan, Prediction, costs, devices
from piece_ops.predict.costs import Work
from piece_ops.predict.models import llama_like

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


# SmolLM2-135M, as `bench.inputs.smollm2_shapes` lists its tensors.
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def pipeline(cases: Mapping[Any, list[dict[str, Any]]]) -> dict[str, tuple[float, float]]:
    """Predicted and measured: ms of the phases of the recorded pipeline, and bytes of its state.

    The whole prediction, as `piece-ops bench --predict --gpu cpu` makes it, with the rates that
    were measured in the same run. Empty if there is no such row.
    """
    lines = [line for of_one in cases.values() for line in of_one if line["kind"] == "row"]
    floors = [line["gb_per_s"] for line in lines if line["role"] == "floor" and line["n"] >= 1e8]
    for line in lines:
        is_ours = line["op"] == "pipeline" and line["role"] == "ours" and line["status"] == "ok"
        if not is_ours or line["quick"] or not floors:
            continue
        figures = line["figures"]
        model = Model("SmolLM2-135M", llama_like(SMOLLM2), "its shapes")
        on = devices.cpu(0.0, max(floors) * 1e9, line["gflop_per_s"] * 1e9, "measured")
        plan = Plan("piece-s", 1e-3, torch.float32, samples=16, length=128, tokens=4 * 128)
        importance, selection, step = Prediction(model, on, plan).phases
        return {
            "importance": (importance.ours.seconds(on) * 1e3, figures["importance_ms"]),
            "selection": (selection.ours.seconds(on) * 1e3, figures["select_ms"]),
            "a step": (step.ours.seconds(on) * 1e3, line["p50_ms"]),
            "bytes of state": (step.ours_bytes, figures["state_bytes"]),
        }
    return {}
