"""A task's training on disk, so that a killed run goes on from there with the same bits.

A checkpoint holds what is trained (for a selection the k float32 values, never the whole model),
the optimizer's state, the state of torch's random numbers, the losses so far, and with their number
the position in the data: batches are drawn from a seed, so the drawing is repeated up to there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from piece_ops._files import read_tensors, write_tensors
from piece_ops.training.learner import Learner
from piece_ops.training.output import TaskFiles

CHECKPOINT_SECONDS = 300.0
"""Time between checkpoints within a task: the most work that a kill costs there."""

_FORMAT, _VERSION = "piece_ops.checkpoint", 1
_WHERE = "piece_ops.training.checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A training under way, as read from its file.

    Attributes
    ----------
    losses : list of float
        Of every step taken.
    segment : int
        Refreshed selections so far.
    seconds : float
        Time spent on these steps.
    """

    losses: list[float]
    segment: int
    seconds: float
    _path: Path
    _info: dict[str, Any]
    _read: Callable[[str], Tensor]

    def _tensor(self, name: str, like: Tensor | None = None) -> Tensor:
        try:
            found = self._read(name)
        except SafetensorError as error:
            raise ValueError(f"{_WHERE}: {str(self._path)!r} is damaged: {error}") from error
        if like is not None and (found.shape, found.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"{_WHERE}: {str(self._path)!r} must hold {like.dtype} {list(like.shape)} for "
                f"{name!r}, got {found.dtype} {list(found.shape)}"
            )
        return found

    @torch.no_grad()
    def restore(self, learner: Learner) -> None:
        """Put values, gradients' presence, optimizer state and random numbers back."""
        state = {}
        for place, (name, parameter) in enumerate(learner.parameters.items()):
            parameter.copy_(self._tensor(f"values/{name}", parameter))
            # A parameter with a gradient of zeros moves by its momentum, one without does not.
            parameter.grad = torch.zeros_like(parameter) if name in self._info["graded"] else None
            if name in self._info["state"]:
                held = dict(self._info["state"][name])
                for key, kept in held.items():
                    if kept is None:
                        held[key] = self._tensor(f"state/{key}/{name}")
                state[place] = held
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(self._tensor("random/cpu"))
        if self._info["cuda"] is not None:
            torch.cuda.set_rng_state(self._tensor("random/cuda"), self._info["cuda"])

    def load_values(self, learner: Learner) -> None:
        """Put the values back only: for a task that is done."""
        with torch.no_grad():
            for name, parameter in learner.parameters.items():
                parameter.copy_(self._tensor(f"values/{name}", parameter))


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a file of `write_checkpoint`; ValueError when it is damaged."""
    info, _, read, _ = read_tensors(path, file_format=_FORMAT, version=_VERSION, where=_WHERE)
    try:
        for key in ("state", "graded", "cuda"):
            info[key]
        return Checkpoint(
            info["losses"], int(info["segment"]), float(info["seconds"]), path, info, read
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_WHERE}: the header of {str(path)!r} is incomplete: {error!r}"
        ) from error


def write_checkpoint(path: Path, learner: Learner, losses: list[float], seconds: float) -> None:
    """Write where a training stands, atomically."""
    tensors = {"random/cpu": torch.get_rng_state()}
    states: dict[str, dict[str, Any]] = {}
    for name, parameter in learner.parameters.items():
        tensors[f"values/{name}"] = parameter.detach()
        held = learner.optimizer.state.get(parameter)
        if not held:
            continue
        # A number stands in the header, a tensor is None there.
        states[name] = {k: None if isinstance(v, Tensor) else v for k, v in held.items()}
        tensors |= {f"state/{k}/{name}": v for k, v in held.items() if isinstance(v, Tensor)}
    device = next(iter(learner.parameters.values())).device
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    info = {
        "losses": losses,
        "segment": learner.segment,
        "seconds": seconds,
        "state": states,
        "graded": [name for name, p in learner.parameters.items() if p.grad is not None],
        "cuda": device.index if device.type == "cuda" else None,
    }
    write_tensors(path, tensors, file_format=_FORMAT, version=_VERSION, info=info)


class Keeper:
    """Writes the checkpoints of one task as often as asked, and reads the last one.

    Parameters
    ----------
    files : TaskFiles
    steps : int, optional
        Write after every so many steps.
    seconds : float
        Write when this much time has passed since the last one.
    """

    def __init__(self, files: TaskFiles, steps: int | None, seconds: float) -> None:
        self.files, self._steps, self._seconds = files, steps, seconds
        self._started = self._written = time.monotonic()
        self._before = 0.0

    def read(self) -> Checkpoint | None:
        """Return where the task stands on disk; None when it has not begun."""
        if not self.files.checkpoint.exists():
            return None
        saved = read_checkpoint(self.files.checkpoint)
        self._before = saved.seconds
        return saved

    def after_step(self, learner: Learner, losses: list[float], is_last: bool) -> None:
        """Write if it is time; always after the last step."""
        by_count = self._steps is not None and len(losses) % self._steps == 0
        if is_last or by_count or time.monotonic() - self._written >= self._seconds:
            seconds = self._before + time.monotonic() - self._started
            write_checkpoint(self.files.checkpoint, learner, losses, round(seconds, 2))
            self._written = time.monotonic()
