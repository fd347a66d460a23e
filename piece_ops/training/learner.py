"""What is trained in one task: the selected values, every weight, or a LoRA adapter.

All three go through the same training loop with the same data; they differ in what they train and
in how it gets into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import nn

from piece_ops.delta import Delta
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection
from piece_ops.training.extra import require
from piece_ops.training.settings import Settings


class Learner:
    """What is trained, with its optimizer.

    Attributes
    ----------
    module : callable
        Called as ``module(**batch).loss``.
    parameters : dict of str to nn.Parameter
        What the optimizer moves, in its order.
    optimizer : torch.optim.Optimizer
    segment : int
        How many times the selection has been refreshed.
    """

    module: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    segment = 0

    def finish(self) -> None:
        """Leave what was learned in the model, which is an ordinary one again."""

    def delta(self, task: str, parent: str) -> Delta | None:
        """Return what the task has changed, before `finish`; None where that is every weight."""
        return None


class SparseLearner(Learner):
    """Selected values of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    settings : Settings
    selection : Selection
    earlier : sequence of Delta
        What the task has changed with selections before this one.
    """

    optimizer: SparseAdamW

    def __init__(
        self, model: Any, settings: Settings, selection: Selection, earlier: Sequence[Delta] = ()
    ) -> None:
        self._model, self._settings = model, settings
        self._parts = list(earlier)
        self.segment = len(self._parts)
        self._wrap(selection)

    def _wrap(self, selection: Selection) -> None:
        self.module = PieceModel(self._model, selection)
        self.parameters = dict(self.module.values.named_parameters())
        self.optimizer = SparseAdamW(
            self.parameters.values(), lr=self._settings.lr, weight_decay=self._settings.weight_decay
        )

    def refresh(self, select: Callable[[], Selection]) -> Delta:
        """Go on with another selection; return what was changed with the one so far.

        See `SparseAdamW.carry_over` for what becomes of values and moments.
        """
        part: Delta = self.module.delta()
        previous = self.optimizer
        self.finish()
        self._parts.append(part)
        self.segment += 1
        self._wrap(select())
        self.optimizer.carry_over(previous)
        return part

    def finish(self) -> None:
        """Write the values and unwrap the model."""
        if self.module is not None:
            self.module.unload()
            self.module = None

    def delta(self, task: str, parent: str) -> Delta:
        """Return what the task has changed with all its selections."""
        whole: Delta = reduce(Delta.then, [*self._parts, self.module.delta()])
        return replace(whole, task=task, parent=parent)


class FullLearner(Learner):
    """Every weight of a model: the baseline."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.module = model
        self.parameters = dict(model.named_parameters())
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = _dense_adamw(self.parameters, settings)


class LoraLearner(Learner):
    """A low-rank adapter of every linear layer, by peft; merged into the weights in the end."""

    def __init__(self, model: Any, settings: Settings) -> None:
        peft = require("peft", "method lora")
        self._required = [(p, p.requires_grad) for p in model.parameters()]
        config = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.module = peft.get_peft_model(model, config)
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.optimizer = _dense_adamw(self.parameters, settings)

    def finish(self) -> None:
        """Add the adapter's product to the weights and remove it."""
        self.module.merge_and_unload()
        for parameter, required in self._required:
            parameter.requires_grad_(required)


def _dense_adamw(parameters: dict[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )


def make_learner(model: Any, settings: Settings, selection: Selection | None) -> Learner:
    """Return what trains a model: the selection's values, or without one what the method says."""
    if selection is not None:
        return SparseLearner(model, settings, selection)
    if settings.method == "lora":
        return LoraLearner(model, settings)
    return FullLearner(model, settings)
