"""AdamW on the selected values of a `PieceModel`, fused with writing them into the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops.backends import ADAMW_STEPS
from piece_ops.functional import sparse_adamw_

_NO_VALUES = "piece_ops.SparseAdamW: there must be values of a PieceModel to train"


class SparseAdamW(torch.optim.Optimizer):
    """AdamW for the values of a `PieceModel`: gather, update and scatter in one call.

    For values v with gradient g, at step t (decoupled decay; decay acts on these values only)::

        v <- v (1 - lr weight_decay)
        m <- m + (g - m)(1 - beta1);    s <- s beta2 + g^2 (1 - beta2)
        v <- v - lr / (1 - beta1^t) * m / (sqrt(s) / sqrt(1 - beta2^t) + eps)
        weight[indices] <- v, rounded to the weight's dtype

    which is ``torch.optim.AdamW`` on the float32 values. State: two float32 numbers per selected
    coordinate and a step count per parameter.

    Parameters
    ----------
    params : iterable
        ``model.parameters()`` of a `PieceModel`, or parameter groups of its values. The frozen
        dense weights among them are left out; values without a gradient, or whose
        ``requires_grad`` is off, are skipped by `step`.
    lr : float
        Learning rate, not negative.
    betas : tuple of float
        In [0, 1).
    eps : float
        Not negative.
    weight_decay : float
        Not negative; default 0 (``torch.optim.AdamW`` has 0.01).

    Raises
    ------
    TypeError
        For a trainable parameter that is not one of a PieceModel's values.
    ValueError
        When a number is out of range or no values are given.

    Examples
    --------
    >>> import torch, piece_ops
    >>> layer = torch.nn.Linear(3, 2)
    >>> chosen = piece_ops.estimate(layer, method="magnitude", k=3)
    >>> model = piece_ops.PieceModel(layer, chosen)
    >>> optimizer = piece_ops.SparseAdamW(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._steps: dict[int, Callable[..., None]] = {}  # by parameter group
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        if not any(group["params"] for group in self.param_groups):
            raise ValueError(f"{_NO_VALUES}, got none in {len(self.param_groups)} groups")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add values with settings of their own; nothing is added when one of them is wrong."""
        where = "piece_ops.SparseAdamW"
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        kept = []
        for item in given:
            parameter = item[1] if isinstance(item, tuple) else item
            if getattr(parameter, "piece_target", None) is not None:
                kept.append(item)
            elif not isinstance(parameter, nn.Parameter) or parameter.requires_grad:
                raise TypeError(
                    f"{where}: parameters must be values of a PieceModel, got an ordinary "
                    f"{type(parameter).__name__} that requires grad; wrap the model with "
                    "PieceModel(model, selection) first, or use torch.optim.AdamW"
                )
        if given and not kept:  # transformers' Trainer gives an empty group where all decay
            raise ValueError(f"{_NO_VALUES}, got none among {len(given)} parameters")
        settings = {**self.defaults, **param_group}
        _check_settings(settings, where)
        super().add_param_group({**param_group, "params": kept})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all values that have a gradient; the weights are written with it.

        As in ``torch.optim.AdamW`` nothing is checked: a NaN or infinite gradient makes its value
        and weight NaN for good. Clip with ``error_if_nonfinite=True``, or use a GradScaler, where
        that may happen.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss anew, with gradients; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # One call per step count: all the same unless values had no gradient at times.
            by_step: dict[int, list[nn.Parameter]] = {}
            for values in group["params"]:
                if values.grad is None or not values.requires_grad:
                    continue
                self._check_values(values)
                state = self.state[values]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(values)
                    state["exp_avg_sq"] = torch.zeros_like(values)
                by_step.setdefault(int(state["step"]) + 1, []).append(values)
            for step, members in by_step.items():
                self._update(group, step, members)
        return loss

    def _update(self, group: dict[str, Any], step: int, members: list[nn.Parameter]) -> None:
        targets = [values.piece_target for values in members]  # type: ignore[attr-defined]
        states = [self.state[values] for values in members]
        self._call_for(group, members[0].device.type)(
            [target.weight for target in targets],
            [target.indices for target in targets],
            members,
            [values.grad for values in members],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            step=step,
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
        )
        for target, state in zip(targets, states, strict=True):
            state["step"] = step
            target.mark_synced()

    def _call_for(self, group: dict[str, Any], device: str) -> Callable[..., None]:
        """``sparse_adamw_``, or what the device has for the same tensors again and again."""
        if device not in ADAMW_STEPS:
            return sparse_adamw_
        position = next(i for i, other in enumerate(self.param_groups) if other is group)
        if position not in self._steps:
            self._steps[position] = ADAMW_STEPS[device]()
        return self._steps[position]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied, unpickled or loaded optimizer has other tensors to step on."""
        super().__setstate__(state)
        self._steps = {}

    @staticmethod
    def _check_values(values: nn.Parameter) -> None:
        if not values.piece_target.active:  # type: ignore[attr-defined]
            raise RuntimeError(
                "piece_ops.SparseAdamW.step: the values must belong to a wrapped model, got those "
                "of a PieceModel that has been unloaded"
            )

    @torch.no_grad()
    def carry_over(self, previous: SparseAdamW) -> None:
        """Go on from the optimizer of an earlier selection of the same model.

        Call it once, after the earlier `PieceModel` was unloaded and the model wrapped with another
        selection, before the first step. For every weight that both selections touch, coordinates
        in both keep their float32 value and their moments; coordinates that are new start from the
        weight, with moments of zero. The step count is one per weight and goes on, so the first
        update of a new coordinate is up to (1 - beta1) / sqrt(1 - beta2) times lr (3.2 with the
        defaults) instead of lr. Weights that only this selection touches start at step 0. What has
        left the selection stays in the weight as trained; its moments are gone.

        Parameters
        ----------
        previous : SparseAdamW

        Examples
        --------
        >>> import torch, piece_ops
        >>> layer = torch.nn.Linear(3, 2)
        >>> first = piece_ops.PieceModel(layer, piece_ops.estimate(layer, method="random", k=3))
        >>> optimizer = piece_ops.SparseAdamW(first.parameters(), lr=1e-3)
        >>> layer = first.unload()
        >>> chosen = piece_ops.estimate(layer, method="magnitude", k=3)
        >>> second = piece_ops.PieceModel(layer, chosen)
        >>> refreshed = piece_ops.SparseAdamW(second.parameters(), lr=1e-3)
        >>> refreshed.carry_over(optimizer)
        """
        earlier = {values.piece_target.name: values for values in _values_of(previous)}
        for values in _values_of(self):
            target = values.piece_target
            old = earlier.get(target.name)
            if old is None:
                continue
            before = old.piece_target.indices
            here = torch.isin(target.indices, before, assume_unique=True)
            there = torch.isin(before, target.indices, assume_unique=True)
            values[here] = old[there]
            target.mark_synced()  # the weight holds them already, rounded
            if state := previous.state.get(old):
                moved = {key: torch.zeros_like(values) for key in ("exp_avg", "exp_avg_sq")}
                for key, moment in moved.items():
                    moment[here] = state[key][there]
                self.state[values] = {"step": state["step"], **moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict`, bit for bit.

        torch casts floating-point state to the dtype of its parameter: float32 here, like the
        moments themselves. They are copied, so the given dict does not change with later steps.
        """
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key, value in state.items():
                state[key] = value.clone() if isinstance(value, Tensor) else value


def _values_of(optimizer: SparseAdamW) -> list[Any]:
    return [values for group in optimizer.param_groups for values in group["params"]]


def _check_settings(settings: dict[str, Any], where: str) -> None:
    for key in ("lr", "eps", "weight_decay"):
        if not float(settings[key]) >= 0.0:
            raise ValueError(f"{where}: {key} must not be negative, got {settings[key]}")
    betas = settings["betas"]
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"{where}: betas must be two numbers in [0, 1), got {betas!r}")
