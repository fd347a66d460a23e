"""What the ways through the whole pipeline have in common, and how one of them is measured."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from bench.bench_training_step import n_bytes
from bench.harness import LONG, Absent, Role, Row, measure_extra_bytes, timed

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
    `select` is called several times if `cheap_select`, else once. `chooses_like` names a way before
    it that comes to its selection by the same code: what was measured there counts for both.
    """

    name: str
    role: Role = "peer"
    note = ""
    importance: Callable[[list[Batch]], None] | None = None
    select: Callable[[Path], Positions] | None = None
    cheap_select = True
    chooses_like = ""
    may_differ = False  # its choice is not that of piece-s in float32
    all_move = False  # no weight is to stay as it was
    same_first_loss = 1e-3  # relative, to the model's in float32

    def __init__(self, model: Any) -> None:
        self.model = model
        self.whole: set[str] = set()  # tensors that train whole

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
        result, seconds = timed(run)()
        taken.append(seconds * 1e3)
    return result, statistics.median(taken)


def wrong_moves(way: Way, base: nn.Module, chosen: Positions | None) -> str | None:
    """Which of the model's own weights moved by a bit and must not."""
    if way.all_move:
        return None
    before, now = dict(base.named_parameters()), way.weights()
    if set(now) != set(before):
        return f"weights {sorted(set(now) ^ set(before))[:3]} are not those of the model"
    for name, weight in now.items():
        if name in way.whole:
            continue
        old = before[name].detach().to(weight.dtype)
        moved = weight.detach().view(-1) != old.view(-1)
        if chosen and name in chosen:
            moved[chosen[name]] = False
        if moved.any():
            return f"weights of {name} moved that were not selected"
    return None


def wrong_losses(losses: list[float], first: float, epoch: int, same: float = 1e-3) -> str | None:
    """Any `epoch` steps in turn see the same batches: the last ones' losses must be below."""
    if not all(math.isfinite(loss) for loss in losses):
        return "a loss is not finite"
    if abs(losses[0] - first) > same * first:
        return f"the first loss is {losses[0]}, not the model's {first}"
    if not sum(losses[-epoch:]) < sum(losses[:epoch]):
        return f"losses do not fall: {losses[0]:.4f} to {losses[-1]:.4f}"
    return None


def agreement(a: Positions, b: Positions) -> float:
    """The share of b's positions that a has too."""
    shared = sum(int(torch.isin(b[name], a[name]).sum()) for name in b if name in a)
    return shared / sum(positions.numel() for positions in b.values())


WARM_UP = 2  # steps that are not timed: they make optimizer states and gradients


class Measured:
    """One way on its way: its row, its losses and what it selected.

    `start` goes from importance to the first steps, `step` is called in turns with other ways',
    `finish` writes the checkpoint and checks. What raises is a row that says so.
    """

    def __init__(self, kind: Callable[[Any], Way], base: Any, batches: list[Batch]) -> None:
        self.base, self.batches = base, batches
        self.way = kind(copy.deepcopy(base))
        self.row = Row(self.way.name, self.way.role, "ok", 0, note=self.way.note)
        self.chosen: Positions | None = None
        self.choice = "absent: no selection"  # how it came out
        self.losses: list[float] = []
        self.folder = tempfile.TemporaryDirectory()

    @property
    def is_right(self) -> bool:
        return self.row.status == "ok"

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except (Absent, ImportError, NotImplementedError, MemoryError, RuntimeError) as error:
            self.row.status = f"absent: {str(error).splitlines()[0]}"
        if not self.is_right:
            self.row.times_ms = []

    def _phase(self, name: str, run: Callable[[], T], times: int = 1) -> T:
        """Time and extra memory of a phase, the latter of its first call."""
        figures = self.row.figures
        (result, seconds), extra = measure_extra_bytes(timed(run))
        figures[f"{name}_ms"] = seconds * 1e3
        if extra is not None:
            figures[f"{name}_extra_bytes"] = extra
        if times > 1:
            result, figures[f"{name}_ms"] = milliseconds(run, times if seconds < LONG / 2 else 1)
        return result

    def start(self, common: Positions | None, alike: Measured | None = None) -> None:
        """Up to the first steps; they use `common`, if given and the way may not differ.

        `alike` has measured the selection for this way, too.
        """
        self._guarded(lambda: self._start(common, alike))

    def _start(self, common: Positions | None, alike: Measured | None) -> None:
        if alike is not None:
            self.row.status, self.chosen = alike.choice, alike.chosen
            phases = ("importance_", "select_", "same_positions")
            shared = {k: v for k, v in alike.row.figures.items() if k.startswith(phases)}
            self.row.figures.update(shared)
            measured = f"importance and selection: as measured for {alike.way.name}"
            self.row.note = "; ".join(filter(None, [self.row.note, measured]))
        else:
            self._choose(common)
            self.choice = self.row.status
        if self.is_right:
            way, folder = self.way, Path(self.folder.name)
            self._phase("set_up", lambda: way.set_up(self.chosen or {}, folder))
            _, self.row.extra_bytes = measure_extra_bytes(
                lambda: [self._step() for _ in range(WARM_UP)]
            )

    def _choose(self, common: Positions | None) -> None:
        way, folder = self.way, Path(self.folder.name)
        if way.importance:
            importance = way.importance
            self._phase("importance", lambda: importance(self.batches))
        if way.select:
            select = way.select
            found = self._phase("select", lambda: select(folder), 3 if way.cheap_select else 1)
            self.chosen = found
            if common is not None:
                same = agreement(found, common)
                self.row.figures["same_positions"] = same
                if not way.may_differ:
                    self.chosen = common
                    if same < 0.999:
                        self.row.status = f"wrong: {same:.4f} of the positions"

    def _step(self) -> float:
        data = self.batches[len(self.losses) % len(self.batches)]
        loss, taken = milliseconds(lambda: self.way.step(data))
        self.losses.append(float(loss))
        return taken

    def step(self) -> None:
        if self.is_right:
            self._guarded(lambda: self.row.times_ms.append(self._step()))

    def finish(self, first_loss: float) -> None:
        if self.is_right:
            self._guarded(lambda: self._finish(first_loss))
        self.folder.cleanup()

    def _finish(self, first_loss: float) -> None:
        way, figures, epoch = self.way, self.row.figures, len(self.batches)
        figures.update(
            steps=len(self.losses),
            first_epoch_loss=sum(self.losses[:epoch]) / epoch,
            last_epoch_loss=sum(self.losses[-epoch:]) / epoch,
            state_bytes=way.state_bytes(),
            ddp_bytes=n_bytes(way.reduced()),
        )
        target = Path(self.folder.name) / "checkpoint"
        target.mkdir()
        _, figures["checkpoint_ms"] = milliseconds(lambda: way.save(target))
        files = [path for path in target.rglob("*") if path.is_file()]
        figures["file_bytes"] = sum(path.stat().st_size for path in files)
        wrong = wrong_losses(self.losses, first_loss, epoch, way.same_first_loss)
        wrong = wrong or wrong_moves(way, self.base, self.chosen)
        if wrong:
            self.row.status = f"wrong: {wrong}"
