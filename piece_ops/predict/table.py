"""A prediction as text."""

from __future__ import annotations

import math

from piece_ops._text import format_table
from piece_ops.predict.phases import Phase, Prediction

HEADER = ("phase", "piece_ops", "masking", "ratio", "piece_ops", "masking", "ratio")


def seconds_text(seconds: float) -> str:
    """A time with a unit that leaves three digits.

    >>> seconds_text(0.0235), seconds_text(2e-5)
    ('23.5 ms', '20 us')
    """
    for limit, factor, unit in ((1.0, 1, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "us")):
        if seconds >= limit:
            return f"{_digits(seconds * factor)} {unit}"
    raise ValueError(f"piece_ops.predict.seconds_text: must not be negative, got {seconds}")


def bytes_text(n_bytes: float) -> str:
    """A size with a decimal unit.

    >>> bytes_text(16_060_522_496)
    '16.1 GB'
    """
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= limit:
            return f"{_digits(n_bytes / limit)} {unit}"
    return f"{n_bytes:.0f} B"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(ours: float, dense: float) -> str:
    return f"{_digits(dense / ours)} x" if ours > 0 else "-"


def _row(phase: Phase, found: Prediction) -> list[str]:
    ours, dense = phase.ours.seconds(found.on), phase.dense.seconds(found.on)
    return [
        phase.name,
        seconds_text(ours),
        seconds_text(dense),
        _ratio(ours, dense),
        bytes_text(phase.ours_bytes),
        bytes_text(phase.dense_bytes),
        _ratio(phase.ours_bytes, phase.dense_bytes),
    ]


def report(found: Prediction) -> str:
    """The prediction with its assumptions, several lines."""
    model, plan, on = found.model, found.plan, found.on
    few, many = found.reduced_bytes
    step, (least, mixed) = found.phases[-1], found.saved_bytes()
    share = step.ours.seconds(on) / step.dense.seconds(on)
    whole, backward = found.fisher_ratios()
    peaks = [
        found.weights_bytes + max(getattr(phase, which) for phase in found.phases)
        for which in ("ours_bytes", "dense_bytes")
    ]
    lines = [
        "Predicted, not measured: bytes and operations of the algorithms, over rates.",
        f"model      {model.name}: {model.n:,} parameters in {model.tensors:,} tensors, "
        f"{model.active / 1e9:.3g}e9 of them work on a token; {model.source}",
        f"weights    {bytes_text(found.weights_bytes)} in {str(plan.dtype).removeprefix('torch.')}",
        f"device     {on.name}, {bytes_text(on.memory)}: {on.source}",
        f"importance {plan.method}, {plan.samples} samples of {plan.length} tokens",
        f"selection  {found.k:,} of {found.candidates:,} candidates",
        f"step       {plan.tokens:,} tokens" + (f" on each of {plan.gpus}" * (plan.gpus > 1)),
        "",
        "time, and memory beyond weights and activations (accumulators are held until selected)",
        format_table(HEADER, [_row(phase, found) for phase in found.phases]),
        "",
        f"step       {share:.2f} of masking's time; {bytes_text(least)} less memory "
        f"({bytes_text(mixed)} with masking's moments in float32)",
        f"Fisher     piece-f of a batch takes {whole:.2f} of an ordinary forward and backward "
        f"({backward:.2f} of the backward alone)",
        _fits("piece_ops", peaks[0], found),
        _fits("masking", peaks[1], found),
        f"delta      {bytes_text(found.delta_bytes)} (a model: {bytes_text(found.weights_bytes)})",
        f"reduced    {bytes_text(few)} a step by data parallelism (dense: {bytes_text(many)})",
        "masking    plain PyTorch at its least: a backward a sample, torch.topk as one read; "
        "gradient, mask and two moments in the weights' dtype",
        "not counted: attention scores, loss, norms, activation functions; activations' memory",
    ]
    if peaks[0] > on.memory >= found.weights_bytes + found.phases[-1].ours_bytes:
        lines.append(
            "training fits; piece_ops.estimate(..., memory_budget=BYTES) bounds the accumulators"
        )
    return "\n".join(lines)


def _fits(who: str, n_bytes: float, found: Prediction) -> str:
    room = found.on.memory
    verdict = "fits" if n_bytes <= room else f"{math.ceil(n_bytes / room)} of them would hold it"
    return f"peak       {who} {bytes_text(n_bytes)}: {verdict}"
