"""Sums over samples of a model's gradients and of their squares, for a task and for a reference.

The part of `Importance` that runs backward passes; scores and files are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops.functional import ChunkMaxima
from piece_ops.importance.batched import BatchedGradients
from piece_ops.importance.batches import Samples, samples_of
from piece_ops.importance.candidates import Candidates
from piece_ops.importance.on_device import RANKED_AS, OnDevice
from piece_ops.importance.passes import GradientStream, LossFunction, check_loss, loss_of
from piece_ops.importance.rounding import RoundedTarget
from piece_ops.importance.rules import Target
from piece_ops.importance.scores import NEEDS

WHERE = "piece_ops.Importance"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Statistics:
    """Accumulators per candidate parameter, filled one gradient at a time."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        *,
        method: str,
        per_sample: bool | str,
        loss_fn: LossFunction | None,
        accumulators: str,
        seed: int,
    ) -> None:
        self.model = model
        self._candidates = candidates
        self._method = method
        self._per_sample = per_sample
        self._loss_fn = loss_fn
        self._must_reach = True  # whether samples must have gradients for some candidate
        self._dtype = DTYPES[accumulators]
        self._seed = seed
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
        """Samples of the task added so far (batches, with ``per_sample=False``)."""
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
        self._reached = False  # a gradient has arrived
        self._batched: BatchedGradients | None = None  # made by the first batch of several samples
        self._sums: dict[str, Tensor] = {}
        self._square_sums: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}  # square sums of the source that is running
        self._reference_samples = 0
        self._kept: dict[str, Tensor] = {}  # sum of the means of the finished sources
        self._spoiled: str | None = None
        kind = RANKED_AS.get(self._method)
        self._maxima = None if kind is None else ChunkMaxima(kind)

    # ------------------------------------------------------------------------------- accumulating

    def update(self, batch: Any) -> None:
        """Add one batch of the task, of which every row is a sample (see ``per_sample``).

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
        self._add(batch, where, self._loss_fn, self._target(self._square_sums, self._sums))

    def update_reference(self, batch: Any) -> None:
        """Add one batch of what must be kept (piece-g); `finish_reference` begins a new source."""
        self._add_reference_batch(batch, self._loss_fn)

    def _add_reference_batch(self, batch: Any, loss_fn: LossFunction | None) -> None:
        where = f"{WHERE}.update_reference"
        self._needs_reference(where)
        self._reference = self._reference or self._zeros()
        to = self._target(self._reference, {}, self._reference_samples, is_reference=True)
        self._add(batch, where, loss_fn, to)

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
        theirs, ours = importance._candidates, self._candidates
        lacking = [
            name
            for name, parameter in ours.parameters.items()
            if name not in stored
            or stored[name].shape != (ours.shape(name) if name in theirs.rows else parameter.shape)
        ]
        if lacking:
            raise ValueError(
                f"{where}: a reference must cover every candidate in the same shape, got none for "
                f"{len(lacking)} of them, the first {lacking[0]!r}"
            )
        self._kept = self._kept or self._zeros()
        for name, tensor in self._kept.items():
            held = stored[name] if name in theirs.rows else ours.own_rows(name, stored[name])
            tensor.add_((held / importance._samples).to(tensor.device))

    def _target(
        self,
        square_sums: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        first: int | None = None,
        is_reference: bool = False,
    ) -> Target:
        """Where a batch's gradients go: into accumulators, of whatever precision."""
        first = self._samples if first is None else first
        is_exact = self._dtype == torch.float32
        maxima = self._maxima if is_exact and not is_reference else None
        if maxima is not None:
            maxima.constant = self._smallest_constant()
        on_device = OnDevice(maxima, self._weight)
        settings = (square_sums, sums, first, is_reference, on_device, self._candidates.rows)
        return Target(*settings) if is_exact else RoundedTarget(*settings, seed=self._seed)

    def _weight(self, name: str) -> Tensor:
        """The parameter itself, by which bounds on a GPU know it, or a view of its own rows."""
        return self._candidates.own_rows(name, self._candidates.parameters[name])

    def _smallest_constant(self) -> float:
        """At most the constant that the accumulators will be ranked with."""
        return 0.0

    def _add(self, batch: Any, where: str, loss_fn: LossFunction | None, to: Target) -> set[str]:
        """Every sample (or the batch) to where it goes; the parameters that are still left out.

        None are, unless `to` takes everything once (and looks at what it takes itself).
        """
        left = self._add_parts(batch, where, loss_fn, to)
        if not to.once:
            name = to.overflowed(self._candidates.parameters)
            with self._spoiling(f"the batch from sample {to.first} on", lambda: len(self.names)):
                check_overflow(name, where)
        return left

    def _add_parts(
        self, batch: Any, where: str, loss_fn: LossFunction | None, to: Target
    ) -> set[str]:
        self._check_sound(where)
        parameters = self._candidates.parameters
        parts = [batch]
        if self._per_sample:
            samples = self._samples_of(batch, loss_fn, where)
            parts = samples.alone
        if self._per_sample is not True or len(parts) == 1:
            if to.once and len(parts) > 1:
                return set(parameters)
            self._loop(parts, loss_fn, parameters, to, where)
            return set()
        _refuse_batch_norm(self.model, where)
        if self._batched is None:
            self._batched = BatchedGradients(self.model, parameters)
        batched, first = self._batched, to.first
        with self._spoiling(f"a pass over samples from {first} on", lambda: batched.touched):
            arrived = batched.add(samples, loss_fn, parameters, to, where)
            rest = {name: parameters[name] for name in batched.looped}
            self._reached |= arrived
            if self._must_reach and not arrived and not rest:
                raise ValueError(
                    f"{where}: the loss of samples {first} to {first + len(parts) - 1} must depend "
                    f"on the candidate parameters, got one that reaches none of {len(parameters)}"
                )
            if to.once:
                return set(rest)
            is_rest = len(rest) < len(parameters)
            if rest:
                self._loop(parts, loss_fn, rest, to, where, is_rest=is_rest)
        if is_rest:
            self._count(to, len(parts))
        return set()

    def _samples_of(self, batch: Any, loss_fn: LossFunction | None, where: str) -> Samples:
        config = getattr(self.model, "config", None)
        trim = loss_fn is None and not getattr(config, "is_encoder_decoder", False)
        return samples_of(batch, trim=trim, where=where)

    def _samples_in(self, batch: Any, where: str) -> int:
        """The number of samples that a batch of the task counts for."""
        return self._samples_of(batch, self._loss_fn, where).grid.count if self._per_sample else 1

    def _loop(
        self,
        parts: list[Any],
        loss_fn: LossFunction | None,
        parameters: Mapping[str, nn.Parameter],
        to: Target,
        where: str,
        *,
        is_rest: bool = False,
    ) -> None:
        """One backward per part, for some parameters.

        `is_rest`: the other parameters' gradients are in already, so these need not be reached,
        and the samples are not counted.
        """
        stream = GradientStream(self.model, parameters, to.take, where, to.finish)
        with stream.running():
            for row, part in enumerate(parts):
                to.sample = to.first + row
                what = f"sample {to.sample}"
                if len(parts) > 1:
                    what += f" (row {row} of its batch)"
                must_reach = self._must_reach and not is_rest
                loss = loss_of(self.model, part, loss_fn, what=what, where=where)
                check_loss(loss, part, what=what, where=where, must_depend=must_reach)
                if loss.requires_grad:
                    with self._spoiling(f"the backward pass of {what}", lambda: len(stream.seen)):
                        stream.backward(loss, what, must_reach=must_reach)
                self._reached |= bool(stream.seen)
                if not is_rest:
                    self._count(to, 1)

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
        return {name: self._zero(name) for name in self._candidates.parameters}

    def _zero(self, name: str) -> Tensor:
        device = self._candidates.parameters[name].device
        return torch.zeros(self._candidates.shape(name), dtype=self._dtype, device=device)

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


def check_overflow(name: str | None, where: str) -> None:
    """Raise when there is a parameter whose sums overflowed."""
    if name is not None:
        raise ValueError(
            f"{where}: gradients, their squares and the sums of both must be finite in float32, "
            f"got an overflow for {name!r}; scale the loss down"
        )


def _refuse_batch_norm(model: nn.Module, where: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"{where}: samples of one batch must not depend on each other, got batch norm in "
                f"training mode ({name!r}); call model.eval(), or pass per_sample='loop' to "
                "normalise every sample by itself, or per_sample=False"
            )
