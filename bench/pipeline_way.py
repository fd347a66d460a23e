"""What the ways through the whole pipeline have in common, and how one of them is measured."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from bench.bench_training_step import n_bytes
from bench.harness import Absent, Role, Row, measure_extra_bytes

DENSITY = 1e-3
Batch = dict[str, Tensor]
Positions = dict[str, Tensor]  # by parameter name: flat, increasing
T = TypeVar("T")


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state, step counts aside."""
    return n_bytes(s[key] for s in optimizer.state.values() for key in s if key != "step")


class Way:
    """One way from a model to its trained checkpoint.

    `importance`, `select` and `set_up` may be missing (None): then there is nothing of the kind.
    `select` is called several times if `cheap_select`, else once.
    """

    name: str
    role: Role = "peer"
    note = ""
    importance: Callable[[list[Batch]], None] | None = None
    select: Callable[[Path], Positions] | None = None
    cheap_select = True
    may_differ = False  # its choice is not that of piece-s in float32
    trains = True
    all_move = False  # no weight is to stay as it was

    def __init__(self, model: Any) -> None:
        self.model = model

    def set_up(self, chosen: Positions, folder: Path) -> None:
        """Masks, hooks, wrappers and the optimizer."""
        raise NotImplementedError

    optimizer: Any

    def step(self, data: Batch) -> Tensor:
        loss: Tensor = self.model(**data).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def save(self, folder: Path) -> None:
        save_model(self.model, str(folder / "model.safetensors"))

    def reduced(self) -> list[Tensor]:
        """The parameters whose gradients DistributedDataParallel would add up every step."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def state_bytes(self) -> int:
        """Optimizer, gradients and masks or positions, at the step's fullest moment."""
        return n_bytes(self.reduced()) + moments(self.optimizer)

    def weights(self) -> dict[str, Tensor]:
        """The model's own weights, by the names that they have without the way."""
        return dict(self.model.named_parameters())


def milliseconds(run: Callable[[], T], times: int = 1) -> tuple[T, float]:
    """What `run` returns the last time, and the median of its times."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        result = run()
        taken.append((time.perf_counter() - start) * 1e3)
    return result, statistics.median(taken)


def wrong_moves(way: Way, base: nn.Module, chosen: Positions | None) -> str | None:
    """Which of the model's own weights moved by a bit and must not."""
    if way.all_move:
        return None
    before, now = dict(base.named_parameters()), way.weights()
    if set(now) != set(before):
        return f"weights {sorted(set(now) ^ set(before))[:3]} are not those of the model"
    for name, weight in now.items():
        moved = (weight.detach().view(-1) != before[name].detach().view(-1)).nonzero().view(-1)
        allowed = (chosen or {}).get(name, torch.empty(0, dtype=torch.int64))
        if not torch.isin(moved, allowed).all():
            return f"weights of {name} moved that were not selected"
    return None


def wrong_losses(losses: list[float], first: float, epoch: int) -> str | None:
    """Each epoch sees the same batches: the last one's losses must be below the first one's."""
    if not all(math.isfinite(loss) for loss in losses):
        return "a loss is not finite"
    if abs(losses[0] - first) > 1e-3 * first:
        return f"the first loss is {losses[0]}, not the model's {first}"
    if not sum(losses[-epoch:]) < sum(losses[:epoch]):
        return f"losses do not fall: {losses[0]:.4f} to {losses[-1]:.4f}"
    return None


def agreement(a: Positions, b: Positions) -> float:
    """The share of b's positions that a has too."""
    shared = sum(int(torch.isin(b[name], a[name]).sum()) for name in b if name in a)
    return shared / sum(positions.numel() for positions in b.values())


class Measured:
    """The row of a way, its losses and what it selected."""

    def __init__(self, row: Row, losses: list[float], chosen: Positions | None) -> None:
        self.row, self.losses, self.chosen = row, losses, chosen


def measure(
    kind: Callable[[Any], Way],
    base: Any,
    batches: list[Batch],
    steps: int,
    first_loss: float,
    common: Positions | None,
) -> Measured:
    """Take one way from importance to checkpoint.

    Steps use `common`, if given and the way's own selection may not differ: then losses can be
    compared. Times of the first two steps are dropped.
    """
    way = kind(copy.deepcopy(base))
    row, chosen, losses = Row(way.name, way.role, "ok", 0, note=way.note), None, []
    figures = row.figures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if way.importance:
                _, figures["importance_ms"] = milliseconds(lambda: way.importance(batches))
            if way.select:
                select = way.select
                chosen, taken = milliseconds(lambda: select(folder), 3 if way.cheap_select else 1)
                figures["select_ms"] = taken
                if common is not None:
                    figures["same_positions"] = agreement(chosen, common)
                    if not way.may_differ:
                        if figures["same_positions"] < 0.999:
                            row.status = f"wrong: {figures['same_positions']:.4f} of the positions"
                        chosen = common
            gc.collect()
            _, figures["set_up_ms"] = milliseconds(lambda: way.set_up(chosen or {}, folder))
            if way.trains:
                losses = _train(way, base, batches, steps, first_loss, chosen, row)
                target = folder / "checkpoint"
                target.mkdir()
                _, figures["checkpoint_ms"] = milliseconds(lambda: way.save(target))
                files = [path for path in target.rglob("*") if path.is_file()]
                figures["file_bytes"] = sum(path.stat().st_size for path in files)
        except (Absent, ImportError, NotImplementedError, MemoryError, RuntimeError) as error:
            row.status = f"absent: {str(error).splitlines()[0]}"
    if row.status != "ok":
        row.times_ms = []
    return Measured(row, losses, chosen)


def _train(
    way: Way,
    base: Any,
    batches: list[Batch],
    steps: int,
    first_loss: float,
    chosen: Positions | None,
    row: Row,
) -> list[float]:
    """All steps, in a row; then what they moved. Writes times and figures into the row."""

    def run() -> list[tuple[Tensor, float]]:
        return [
            milliseconds(lambda i=i: way.step(batches[i % len(batches)]))  # type: ignore[misc]
            for i in range(steps)
        ]

    done, row.extra_bytes = measure_extra_bytes(run)
    losses = [float(loss) for loss, _ in done]
    row.times_ms = [taken for _, taken in done[2:]]
    row.figures.update(
        steps=steps,
        first_epoch_loss=sum(losses[: len(batches)]) / len(batches),
        last_epoch_loss=sum(losses[-len(batches) :]) / len(batches),
        state_bytes=way.state_bytes(),
        ddp_bytes=n_bytes(way.reduced()),
    )
    wrong = wrong_losses(losses, first_loss, len(batches)) or wrong_moves(way, base, chosen)
    if wrong and row.status == "ok":
        row.status = f"wrong: {wrong}"
    return losses
