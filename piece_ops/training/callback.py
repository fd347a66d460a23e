"""`PieceCallback`: a task's delta, and other selections on the way, in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection
from piece_ops.training.extra import require

_Base: Any = require("transformers", "PieceCallback").TrainerCallback
_WHERE = "piece_ops.training.PieceCallback"


class PieceCallback(_Base):  # type: ignore[misc]
    """Keep what a `PieceModel` has learned as a delta, and select again every so many steps.

    For ``callbacks=[...]`` of transformers' ``Trainer`` and trainers made from it (trl's). The
    delta is ``piece_delta.safetensors`` in the trainer's ``output_dir``: written at every save, and
    at the end from the weights that the trainer leaves (with ``load_best_model_at_end`` the best).
    It has all selected coordinates, so `PieceModel.from_pretrained` can go on from it.

    Parameters
    ----------
    task : str
        What is learned; kept in the delta.
    refresh : int, optional
        Select again after every so many optimizer steps, see `PieceModel.reselect_`. The
        optimizer must be a `SparseAdamW`, whose state moves along: see
        `SparseAdamW.carry_over`. Coordinates of weights that had none before join the first
        parameter group. A checkpoint of the trainer written after a refresh cannot be resumed
        from, nor can it be loaded as the best at the end: PieceModel refuses its state dict.
    select : callable, optional
        With `refresh`: is given the model, not wrapped; returns the next Selection.

    Raises
    ------
    ValueError
        When only one of `refresh` and `select` is given, or `refresh` is not positive.

    Examples
    --------
    >>> from piece_ops.training.callback import PieceCallback
    >>> trainer = Trainer(model, arguments, callbacks=[PieceCallback("mail")])  # doctest: +SKIP
    """

    def __init__(
        self,
        task: str = "",
        *,
        refresh: int | None = None,
        select: Callable[[nn.Module], Selection] | None = None,
    ) -> None:
        if (refresh is None) != (select is None):
            raise ValueError(f"{_WHERE}: refresh and select must be given together, got one")
        if refresh is not None and refresh < 1:
            raise ValueError(f"{_WHERE}: refresh must be a positive number of steps, got {refresh}")
        self._task, self._refresh, self._select = task, refresh, select

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what would fail only after hours."""
        _wrapped(given["model"])
        if self._refresh is not None:
            _fused(given["optimizer"])
            if args.world_size > 1:
                raise ValueError(
                    f"{_WHERE}: refresh must be left out with several processes, since "
                    "DistributedDataParallel reduces the values that it was given, got "
                    f"{args.world_size} processes"
                )
            if args.load_best_model_at_end:
                raise ValueError(
                    f"{_WHERE}: load_best_model_at_end must be off with refresh, since the best "
                    "checkpoint may be of an earlier selection, got on"
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Select again, if it is time and training goes on."""
        if self._select is None or state.global_step % self._refresh:
            return
        if state.global_step < state.max_steps:
            model = _wrapped(given["model"])
            model.reselect_(self._select)
            _follow(_fused(given["optimizer"]), model)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the delta."""
        if state.is_world_process_zero:
            _wrapped(given["model"]).save_pretrained(args.output_dir, task=self._task)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the delta."""
        self.on_save(args, state, control, **given)


def _wrapped(model: Any) -> PieceModel:
    """The PieceModel inside DistributedDataParallel, torch.compile and the like."""
    for candidate in (model, *model.modules()):
        if isinstance(candidate, PieceModel):
            return candidate
    raise TypeError(f"{_WHERE}: the trainer's model must be a PieceModel, got {type(model)}")


def _fused(optimizer: Any) -> SparseAdamW:
    """The optimizer inside accelerate's."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, SparseAdamW):
        raise TypeError(f"{_WHERE}: with refresh the optimizer must be a SparseAdamW, got {inner}")
    return inner


def _follow(optimizer: SparseAdamW, model: PieceModel) -> None:
    """Give an optimizer the values of another selection, in place: schedulers hold on to it."""
    fresh = SparseAdamW(model.values.parameters())
    fresh.carry_over(optimizer)
    (values,) = (group["params"] for group in fresh.param_groups)
    place = {
        v.piece_target.name: n for n, g in enumerate(optimizer.param_groups) for v in g["params"]
    }
    for group in optimizer.param_groups:
        group["params"] = []
    for value in values:
        optimizer.param_groups[place.get(value.piece_target.name, 0)]["params"].append(value)
    optimizer.state = fresh.state
