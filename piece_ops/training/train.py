"""Training one task: the selected coordinates, or, as the baseline, every weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection
from piece_ops.training.choose import shuffled_batches
from piece_ops.training.encoding import EncodedRow, Encoder
from piece_ops.training.measure import progress
from piece_ops.training.settings import Settings


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
        How many parameters were trained.
    """

    losses: tuple[float, ...]
    trained: int


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
        The task's name; with the seed it decides the order of the rows, the same for every method.
    settings : Settings
    selection : Selection or None
        What to train; None trains every parameter.
    show : bool
        Show a progress bar.

    Returns
    -------
    Trained

    Raises
    ------
    TrainingError
        If the loss is not finite. The model then holds what the steps before have made of it.
    """
    wrapped: PieceModel | None = None
    if selection is None:
        trainable = list(model.parameters())
        for parameter in trainable:
            parameter.requires_grad_(True)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            trainable, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
    else:
        wrapped = PieceModel(model, selection)
        trainable = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = SparseAdamW(trainable, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.gradient_checkpointing:
        _checkpointing(model, True)
    model.train()
    try:
        losses = _loop(wrapped or model, encoder, rows, name, settings, trainable, optimizer, show)
    finally:
        if wrapped is not None:
            wrapped.unload()
        if settings.gradient_checkpointing:
            _checkpointing(model, False)
        model.zero_grad(set_to_none=True)
        model.eval()
    return Trained(tuple(losses), sum(p.numel() for p in trainable))


def _checkpointing(model: Any, on: bool) -> None:
    """Switch recomputing of activations; transformers renamed these two within version 5."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not on:
        getattr(model, f"{name}_checkpointing_disable")()
        return
    # The non-reentrant kind computes gradients although the inputs (frozen embeddings) need none.
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})


def _loop(
    model: Any,
    encoder: Encoder,
    rows: Sequence[EncodedRow],
    name: str,
    settings: Settings,
    trainable: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    show: bool,
) -> list[float]:
    """Take the optimizer steps of one task and return their losses."""
    steps = settings.step_count(len(rows))
    device = trainable[0].device
    batches = shuffled_batches(rows, settings.batch_size, settings.seed, name)
    losses: list[float] = []
    bar = progress(range(steps), f"training {name}", show)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate_factor(step, steps, settings.warmup)
        loss_sum = 0.0
        for _ in range(settings.accumulation):
            loss = (
                model(**encoder.training_batch(next(batches), device)).loss / settings.accumulation
            )
            loss_sum += loss.item()
            if not math.isfinite(loss_sum):
                raise TrainingError(
                    f"task {name}: the loss must be finite, got {loss_sum} at step {step + 1} of "
                    f"{steps} (lr {settings.lr}); a smaller lr may help"
                )
            loss.backward()
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(trainable, settings.clip)
        optimizer.step()
        # Keeping the dense gradients of full fine-tuning spares half a gigabyte of fresh pages a
        # step, which costs more than writing zeros; the sparse ones are small either way.
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss_sum)
        bar.set_postfix_str(f"loss {loss_sum:.3f}", refresh=False)
    return losses
