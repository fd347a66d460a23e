"""Sums over samples of a model's gradients and of their squares, for a task and for a reference.

The part of `Importance` that runs backward passes; scores and files are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops.importance.batched import BatchedGradients
from piece_ops.importance.batches import samples_of
from piece_ops.importance.candidates import Candidates
from piece_ops.importance.passes import GradientStream, LossFunction, check_loss, loss_of
from piece_ops.importance.rules import Target
from piece_ops.importance.scores import NEEDS

WHERE = "piece_ops.Importance"


class Statistics:
    """float32 accumulators per candidate parameter, filled one gradient at a time."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        *,
        method: str,
        per_sample: bool | str,
        loss_fn: LossFunction | None,
    ) -> None:
        self.model = model
        self._candidates = candidates
        self._method = method
        self._per_sample = per_sample
        self._loss_fn = loss_fn
        self.reset()

    @property
    def method(self) -> str:
        """The scoring method."""
        return self._method

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the candidate parameters, in the model's order."""
        return tuple(self._candidates.parameters)

    @property
    def candidate_count(self) -> int:
        """Elements of all candidates together."""
        return self._candidates.count

    @property
    def total(self) -> int:
        """N, the number of parameters that a density refers to."""
        return self._candidates.total

    @property
    def sample_count(self) -> int:
        """Backward passes over the task's samples added so far."""
        return self._samples

    @property
    def looped(self) -> dict[str, str]:
        """Parameters of the last batch that went by one backward per sample, each with the reason.

        Empty when one batched backward served all, and before the first batch of several samples.
        """
        return {} if self._batched is None else dict(self._batched.looped)

    def reset(self) -> None:
        """Forget all statistics, of the task and of the reference (its sources run once only)."""
        self._samples = 0
        self._batched: BatchedGradients | None = None  # made by the first batch of several samples
        self._sums: dict[str, Tensor] = {}
        self._square_sums: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}  # square sums of the source that is running
        self._reference_samples = 0
        self._kept: dict[str, Tensor] = {}  # sum of the means of the finished sources
        self._spoiled: str | None = None

    # ------------------------------------------------------------------------------- accumulating

    def update(self, batch: Any) -> None:
        """Add one batch of the task: one backward per row (or one, with ``per_sample=False``).

        Parameters
        ----------
        batch : dict of str to Tensor
            Arguments of the model, first dimension the batch; on the model's device. With
            `loss_fn` also a tensor or a list of tensors.
        """
        need = NEEDS[self._method]
        where = f"{WHERE}.update"
        if not need.data:
            raise ValueError(f"{where}: method {self.method!r} needs no data, got a batch")
        if need.sums:
            self._sums = self._sums or self._zeros()
        if need.square_sums:
            self._square_sums = self._square_sums or self._zeros()
        self._add(batch, where, self._loss_fn)

    def update_reference(self, batch: Any) -> None:
        """Add one batch of what must be kept (piece-g); `finish_reference` begins a new source."""
        self._add_reference_batch(batch, self._loss_fn)

    def _add_reference_batch(self, batch: Any, loss_fn: LossFunction | None) -> None:
        where = f"{WHERE}.update_reference"
        self._needs_reference(where)
        self._reference = self._reference or self._zeros()
        self._add(batch, where, loss_fn, to_reference=True)

    def finish_reference(self) -> None:
        """End the current reference source: it enters as one mean, later batches are another."""
        if self._reference_samples:
            for name, tensor in self._reference.items():
                tensor.div_(self._reference_samples)
                if name in self._kept:
                    self._kept[name].add_(tensor)
            self._kept = self._kept or self._reference
            self._reference, self._reference_samples = {}, 0

    def add_reference(self, importance: Statistics) -> None:
        """Add the mean squared gradients that another `Importance` holds, as one source (piece-g).

        Parameters
        ----------
        importance : Importance
            Of method piece-f, piece-s or taylor, over at least the same parameters: statistics of
            an earlier task for instance, loaded with `Importance.load`.
        """
        where = f"{WHERE}.add_reference"
        self._needs_reference(where)
        self._check_sound(where)
        importance._check_sound(where)
        if not importance._square_sums or not importance._samples:
            raise ValueError(
                f"{where}: a reference must hold square sums of at least one sample (piece-f, "
                f"piece-s or taylor), got {importance.method!r} with {importance._samples} samples"
            )
        stored = importance._square_sums
        lacking = [
            name
            for name, parameter in self._candidates.parameters.items()
            if name not in stored or stored[name].shape != parameter.shape
        ]
        if lacking:
            raise ValueError(
                f"{where}: a reference must cover every candidate in the same shape, got none for "
                f"{len(lacking)} of them, the first {lacking[0]!r}"
            )
        self._kept = self._kept or self._zeros()
        for name, tensor in self._kept.items():
            tensor.add_((stored[name] / importance._samples).to(tensor.device))

    def _add(
        self, batch: Any, where: str, loss_fn: LossFunction | None, to_reference: bool = False
    ) -> None:
        """Every sample (or the batch) into the task's sums, or into the reference's squares."""
        self._check_sound(where)
        squares = self._reference if to_reference else self._square_sums
        first = self._reference_samples if to_reference else self._samples
        to = Target(squares, {} if to_reference else self._sums, first, to_reference)
        if not self._per_sample:
            self._loop([batch], loss_fn, self._candidates.parameters, to, where)
            return
        config = getattr(self.model, "config", None)
        trim = loss_fn is None and not getattr(config, "is_encoder_decoder", False)
        samples = samples_of(batch, trim=trim, where=where)
        if self._per_sample == "loop" or samples.grid.count == 1:
            self._loop(samples.alone, loss_fn, self._candidates.parameters, to, where)
            return
        _refuse_batch_norm(self.model, where)
        if self._batched is None:
            self._batched = BatchedGradients(self.model, self._candidates.parameters)
        batched = self._batched
        with self._spoiling(f"a pass over samples from {first} on", lambda: batched.touched):
            arrived = batched.add(samples, loss_fn, to, where)
        rest = {name: self._candidates.parameters[name] for name in batched.looped}
        if len(rest) == len(self._candidates.parameters):
            self._loop(samples.alone, loss_fn, rest, to, where)
            return
        with self._spoiling(f"samples from {first} on", lambda: 1):
            if rest:
                arrived |= self._loop(samples.alone, loss_fn, rest, to, where, is_rest=True)
        if not arrived:
            raise ValueError(
                f"{where}: the loss of samples {first} to {first + samples.grid.count - 1} must "
                f"depend on the candidate parameters, got one that reaches none of "
                f"{len(self._candidates.parameters)}"
            )
        self._count(to, samples.grid.count)

    def _loop(
        self,
        parts: list[Any],
        loss_fn: LossFunction | None,
        parameters: Mapping[str, nn.Parameter],
        to: Target,
        where: str,
        *,
        is_rest: bool = False,
    ) -> bool:
        """One backward per part, for some parameters; whether any gradient arrived.

        `is_rest`: the other parameters' gradients are in already, so these need not be reached,
        and the samples are not counted.
        """
        arrived = False
        stream = GradientStream(self.model, parameters, to.add, where)
        with stream.running():
            for row, part in enumerate(parts):
                what = f"sample {to.first + row}"
                if len(parts) > 1:
                    what += f" (row {row} of its batch)"
                loss = loss_of(self.model, part, loss_fn, what=what, where=where)
                check_loss(loss, part, what=what, where=where, must_depend=not is_rest)
                if not loss.requires_grad:
                    continue
                with self._spoiling(f"the backward pass of {what}", lambda: len(stream.seen)):
                    stream.backward(loss, what, must_reach=not is_rest)
                arrived |= bool(stream.seen)
                if not is_rest:
                    self._count(to, 1)
        return arrived

    def _count(self, to: Target, samples: int) -> None:
        if to.is_reference:
            self._reference_samples += samples
        else:
            self._samples += samples

    @contextmanager
    def _spoiling(self, what: str, touched: Callable[[], int]) -> Iterator[None]:
        """Remember that the statistics are incomplete if something stops after an addition."""
        try:
            yield
        except BaseException as error:
            if touched():
                self._spoiled = f"{what} stopped after {touched()} parameters: {error}"
            raise

    def _zeros(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in self._candidates.parameters.items()
        }

    def _check_sound(self, where: str) -> None:
        if self._spoiled is not None:
            raise RuntimeError(
                f"{where}: the statistics are incomplete, call reset() and start over; "
                f"{self._spoiled}"
            )

    def _needs_reference(self, where: str) -> None:
        if not NEEDS[self.method].reference:
            raise ValueError(f"{where}: only method 'piece-g' has a reference, got {self.method!r}")

    def _reference_statistics(self, where: str) -> tuple[dict[str, Tensor], int]:
        """Squares of the reference and how many samples they are summed over (1: means)."""
        if not self._kept and not self._reference_samples:
            raise ValueError(
                f"{where}: piece-g needs a reference, got none; pass reference= or call "
                "update_reference()"
            )
        if not self._kept:
            return self._reference, self._reference_samples
        if not self._reference_samples:
            return self._kept, 1
        both = {n: t / self._reference_samples for n, t in self._reference.items()}
        return {name: tensor.add_(self._kept[name]) for name, tensor in both.items()}, 1


def _refuse_batch_norm(model: nn.Module, where: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"{where}: samples of one batch must not depend on each other, got batch norm in "
                f"training mode ({name!r}); call model.eval(), or pass per_sample='loop' to "
                "normalise every sample by itself, or per_sample=False"
            )
