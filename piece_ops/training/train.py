"""Training one task: the selected coordinates, or, for comparison, every weight or an adapter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from piece_ops.delta import Delta
from piece_ops.selection import Selection
from piece_ops.training.checkpoint import Keeper
from piece_ops.training.choose import shuffled_batches
from piece_ops.training.encoding import EncodedRow, Encoder
from piece_ops.training.learner import Learner, SparseLearner, make_learner
from piece_ops.training.measure import progress
from piece_ops.training.settings import Settings

Reselect = Callable[[int], Selection]
"""Gets the number of the refresh, from 1, and returns the selection to go on with."""


class TrainingError(RuntimeError):
    """Training cannot go on; the text says at which step and what was found."""


@dataclass(frozen=True)
class Trained:
    """What happened in the training of one task.

    Attributes
    ----------
    losses : tuple of float
        Loss of each step (mean over its passes), before its update.
    trained : int
        How many parameters were trained (at a time).
    delta : Delta or None
        What it changed in the model; None for ``full`` and ``lora``, which change nearly all of it.
    seconds_before : float
        Time that went into the steps before the checkpoint it was resumed from.
    """

    losses: tuple[float, ...]
    trained: int
    delta: Delta | None
    seconds_before: float = 0.0


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate for a step: a linear rise, then a linear fall.

    Parameters
    ----------
    step : int
        From 0.
    steps : int
        Of the task.
    warmup : float
        Share of the steps that rise.

    Examples
    --------
    >>> [rate_factor(step, 4, 0.5) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising)


def train_task(
    model: Any,
    encoder: Encoder,
    rows: Sequence[EncodedRow],
    name: str,
    settings: Settings,
    selection: Selection | None,
    show: bool = False,
    *,
    keeper: Keeper | None = None,
    reselect: Reselect | None = None,
    parent: str = "",
) -> Trained:
    """Train a model on one task, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place; in evaluation mode and unwrapped afterwards.
    encoder : Encoder
    rows : sequence of EncodedRow
        The task's training rows.
    name : str
        The task's name; with the seed it decides the order of the rows, the same for every method,
        and what dropout and a new adapter draw.
    settings : Settings
    selection : Selection or None
        What to train; None trains an adapter (``lora``) or every parameter.
    show : bool
        Show a progress bar.
    keeper : Keeper, optional
        Writes checkpoints; if there is one already, the training goes on from it.
    reselect : callable, optional
        Needed with ``settings.refresh``.
    parent : str
        Digest of the delta that the model holds, for the record in the new one.

    Returns
    -------
    Trained

    Raises
    ------
    TrainingError
        If the loss is not finite. The model then holds what the steps before have made of it.
    """
    device = next(model.parameters()).device
    steps = settings.step_count(len(rows))
    losses: list[float] = []
    seconds = 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(f"piece_ops draws {settings.seed} {name}").getrandbits(63))
        saved = keeper.read() if keeper else None
        if keeper and saved and saved.segment:
            learner: Learner = _refreshed(model, settings, keeper, saved.segment)
        else:
            learner = make_learner(model, settings, selection)
        if settings.gradient_checkpointing:
            _checkpointing(model, True)
        model.train()
        try:
            if saved:
                saved.restore(learner)
                losses, seconds = saved.losses, saved.seconds
            batches = shuffled_batches(rows, settings.batch_size, settings.seed, name)
            batches = islice(batches, len(losses) * settings.accumulation, None)
            bar = progress(range(len(losses), steps), f"training {name}", show)
            for step in bar:
                if settings.refresh and reselect and step // settings.refresh > learner.segment:
                    _refresh(learner, model, reselect, keeper)
                for group in learner.optimizer.param_groups:
                    group["lr"] = settings.lr * rate_factor(step, steps, settings.warmup)
                loss = _step(learner, encoder, batches, settings, device)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"task {name}: the loss must be finite, got {loss} at step {step + 1} of "
                        f"{steps} (lr {settings.lr}); a smaller lr may help"
                    )
                losses.append(loss)
                if keeper:
                    keeper.after_step(learner, losses, is_last=step + 1 == steps)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            delta = learner.delta(name, parent)
        finally:
            learner.finish()
            if settings.gradient_checkpointing:
                _checkpointing(model, False)
            model.zero_grad(set_to_none=True)
            model.eval()
    trained = sum(parameter.numel() for parameter in learner.parameters.values())
    return Trained(tuple(losses), trained, delta, seconds)


def _refreshed(model: Any, settings: Settings, keeper: Keeper, segment: int) -> SparseLearner:
    """Bring a model to the selection it was last trained with in this task."""
    parts = [Delta.load(keeper.files.part(i)) for i in range(segment)]
    for part in parts:
        part.apply_(model)
    return SparseLearner(model, settings, Selection.load(keeper.files.selection(segment)), parts)


def _refresh(learner: Learner, model: Any, reselect: Reselect, keeper: Keeper | None) -> None:
    """Choose anew on the weights as they are now, and keep on disk what a checkpoint builds on."""
    assert isinstance(learner, SparseLearner)  # settings allow refresh with selections only

    def select() -> Selection:
        model.eval()
        selection = reselect(learner.segment)
        model.train()
        if keeper:
            selection.save(keeper.files.selection(learner.segment))
        return selection

    part = learner.refresh(select)
    if keeper:
        part.save(keeper.files.part(learner.segment - 1))


def _step(
    learner: Learner, encoder: Encoder, batches: Any, settings: Settings, device: Any
) -> float:
    """Take one optimizer step; return its loss, and take none when that is not finite."""
    loss_sum = 0.0
    for _ in range(settings.accumulation):
        batch = encoder.training_batch(next(batches), device)
        loss = learner.module(**batch).loss / settings.accumulation
        loss_sum += float(loss.item())
        if not math.isfinite(loss_sum):
            return loss_sum
        loss.backward()
    if settings.clip:
        torch.nn.utils.clip_grad_norm_(list(learner.parameters.values()), settings.clip)
    learner.optimizer.step()
    # Keeping the dense gradients of full fine-tuning spares half a gigabyte of fresh pages a step,
    # which costs more than writing zeros; the sparse ones are small either way.
    learner.optimizer.zero_grad(set_to_none=False)
    return loss_sum


def _checkpointing(model: Any, on: bool) -> None:
    """Switch recomputing of activations; transformers renamed these two within version 5."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not on:
        getattr(model, f"{name}_checkpointing_disable")()
        return
    # The non-reentrant kind computes gradients although the inputs (frozen embeddings) need none.
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
