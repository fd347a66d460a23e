"""The whole pipeline on SmolLM2-135M: importance of 16 samples, 0.1 % selected, steps, checkpoint.

Steps of 4 x 128 tokens in float32 (PIECE as released: bfloat16), the 16 samples over and over,
beside pure-PyTorch masking in three forms, PIECE as released, FISH-mask's procedure, PEFT's SHiRA
and LoRA, and full fine-tuning. All ways stay in memory and step in turns, so a slow phase of the
machine hits all alike; all take the same number of steps: 6, and up to 20 of what fits into
`SECONDS`. Times of a row are those of its steps but for the first two. Importance, set-up and
checkpoint are timed once, a selection three times (where it takes a second once, after a first
call; PIECE as released once). Importance and
selection of the three maskings are one piece of code, so they are run once for all three. Extra
memory is measured around each phase; that of the steps around the first two, which make gradients,
moments and activations.

Checked: the first loss is the model's, losses are finite and fall, only selected weights moved, by
their bits; torch's selection is ours (but for 0.1 % of it: sums are rounded in another order). The
three maskings then train ours, and losses must agree.

What to expect of a step: see `bench_training_step`. Memory: 16 bytes a weight of the trained
tensors with dense masks (gradient, mask, two moments), about 40 a selected weight with ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.bench_training_step import Sampled, n_bytes
from bench.harness import Case, Row, Target, require_memory, time_ratio, under_best
from bench.pipeline_official import OFFICIAL, Official
from bench.pipeline_peft import SHIRA, Lora, Shira
from bench.pipeline_torch import (
    MASKINGS,
    MULTIPLY,
    Fish,
    Full,
    Gather,
    Hooks,
    Multiply,
)
from bench.pipeline_way import DENSITY, WARM_UP, Batch, Measured, Positions, Way
from bench.smollm2 import FOLDER, ROOT, load

OURS = "piece_ops"
STEPS, FEWEST = 20, 6
SECONDS = 60.0  # of all steps of all ways; the fewest rounds, 4 of 15 s, reach it
MEMORY = 14e9  # of all ways at once
# Gradients are float32 sums in another order. Where one is hardly more than its rounding, AdamW's
# first steps, which normalise it, may turn round: a few of the k move by lr the other way.
SAME_LOSS = 1e-3


class Ours(Way):
    """`Importance` (one batched pass a batch), `PieceModel`, `SparseAdamW`, `Delta`."""

    name, role = OURS, "ours"

    def importance(self, batches: list[Batch]) -> None:
        self.scores = piece_ops.Importance(self.model, "piece-s")
        for batch in batches:
            self.scores.update(batch)

    def select(self, folder: Path) -> Positions:
        self.selection = self.scores.select(density=DENSITY)
        return self.selection.indices

    def set_up(self, chosen: Positions, folder: Path) -> None:
        del self.scores
        self.run = Sampled(self.model, self.selection)

    def step(self, data: Batch) -> Tensor:
        return self.run.step(data)

    def save(self, folder: Path) -> None:
        self.run.model.delta().save(folder / "delta.safetensors")

    def reduced(self) -> list[Tensor]:
        return list(self.run.model.values.parameters())

    def state_bytes(self) -> int:
        return self.run.held_bytes() + n_bytes(self.reduced())  # their gradients

    def weights(self) -> dict[str, Tensor]:
        return dict(self.run.model.model.named_parameters())


def batches(quick: bool) -> list[Batch]:
    """Four batches of four rows: the 16 samples. Real text, so that piece-s chooses as in use."""
    if quick:
        ids = torch.randint(1000, (4, 4, 16), generator=torch.Generator().manual_seed(0))
    else:
        from transformers import AutoTokenizer

        text = "".join(
            (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
            for name in ("design", "contracts")
        )
        tokens: Any = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt")["input_ids"]
        ids = tokens[0, : 16 * 128].view(4, 4, 128)
    return [{"input_ids": rows, "labels": rows} for rows in ids]


def figure(name: str, *figures: str) -> Callable[[dict[str, Row]], float | None]:
    """The sum of a row's figures."""

    def read(rows: dict[str, Row]) -> float | None:
        row = rows.get(name)
        if row is None or row.status != "ok" or not all(f in row.figures for f in figures):
            return None
        return sum(row.figures[f] for f in figures)

    return read


def ratio(above: Any, below: Any, scale: float = 1.0) -> Callable[[dict[str, Row]], float | None]:
    def measured(rows: dict[str, Row]) -> float | None:
        a, b = above(rows), below(rows)
        return scale * a / b if a is not None and b else None

    return measured


def least(figures: str) -> Callable[[dict[str, Row]], float | None]:
    """The smallest figure among the three maskings."""

    def read(rows: dict[str, Row]) -> float | None:
        return min(
            (x for n in MASKINGS if (x := figure(n, figures)(rows)) is not None), default=None
        )

    return read


def targets() -> list[Target]:
    made = [
        Target("step: faster than the best masking", under_best(MASKINGS, OURS), 1.4, False),
        Target(
            "selection: faster than torch.topk",
            ratio(least("select_ms"), figure(OURS, "select_ms")),
            30,
            False,
        ),
    ]
    for what, key, limit in (
        ("optimizer + gradients + masks", "state_bytes", 2),
        ("checkpoint", "file_bytes", 1),
    ):
        for whose, theirs in (
            ("dense masks'", figure(MULTIPLY, key)),
            ("the leanest masking's", least(key)),
        ):
            share = ratio(figure(OURS, key), theirs, 100)
            made.append(Target(f"{what} / {whose}", share, limit, at_most=True, unit="%"))
    both = ("select_ms", "set_up_ms")
    return [
        *made,
        Target(
            "selection + set-up: faster than PIECE as released",
            ratio(figure(OFFICIAL, *both), figure(OURS, *both)),
            100,
            False,
        ),
        Target("step: faster than SHiRA", time_ratio(SHIRA, OURS), 1, False),
        Target(
            "checkpoint / SHiRA's",
            ratio(figure(OURS, "file_bytes"), figure(SHIRA, "file_bytes"), 100),
            100,
            at_most=True,
            unit="%",
        ),
    ]


def check_losses(ours: Measured, other: Measured) -> None:
    """Same selection, same rates: the losses are the same but for rounding."""
    pairs = list(zip(ours.losses, other.losses, strict=False))
    if not pairs or not other.is_right:
        return
    apart = max(abs(a - b) / a for a, b in pairs)
    other.row.figures["losses_apart"] = apart
    if not apart <= SAME_LOSS:
        other.row.status, other.row.times_ms = f"wrong: losses differ by {apart:.1e}", []


def pipeline(quick: bool) -> Case:
    torch.manual_seed(0)
    base = load(quick, torch.float32)
    if not quick:
        require_memory(MEMORY)
    total = sum(weight.numel() for weight in base.parameters())
    rows = [done.row for done in all_ways(base, batches(quick), quick)]
    return Case("pipeline", "fp32", total, 0, [], targets(), rows, k=int(DENSITY * total))


def all_ways(base: Any, data: list[Batch], quick: bool) -> list[Measured]:
    with torch.no_grad():
        first = float(base(**data[0]).loss)
    kinds = (Ours, Multiply, Hooks, Gather, Official, Fish, Shira, Lora, Full)
    ways: list[Measured] = []
    for kind in kinds:
        ways.append(Measured(kind, base, data))
        alike = next((way for way in ways if way.way.name == kind.chooses_like), None)
        ways[-1].start(ways[0].chosen if len(ways) > 1 else None, alike)
    begin = time.monotonic()
    for number in range(WARM_UP, FEWEST if quick else STEPS):
        if number >= FEWEST and time.monotonic() - begin > SECONDS:
            break
        for way in ways:
            way.step()
    for way in ways:
        way.finish(first)
    for masking in ways[1 : 1 + len(MASKINGS)]:
        check_losses(ways[0], masking)
    return ways


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    name = "a small Llama" if quick else "SmolLM2-135M"
    yield f"{name}, 16 samples, 0.1 %, 4 x 128 tokens a step", partial(pipeline, quick)
