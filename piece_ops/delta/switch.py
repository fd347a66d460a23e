"""Many tasks on one live model: checked once, then a switch is 2 k writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import compress
from operator import is_
from typing import Any

from torch import Tensor, nn

from piece_ops._inject import is_injected, owners_of
from piece_ops.delta import live
from piece_ops.delta.record import Delta
from piece_ops.functional import scatter_


class TaskSwitch:
    """Keeps the deltas of several tasks beside a model and puts one of them in at a time.

    Parameters
    ----------
    model : nn.Module
        The base model of all the deltas, with none of them applied.
    deltas : dict of str to Delta
        By task. All of this one base; of a stack use ``first``, ``first.then(second)`` and so on.

    Attributes
    ----------
    active : str or None
        The task whose delta the model holds; None: the base model.

    Raises
    ------
    ValueError
        As of `Delta.apply_`, here and not later: every delta is compared with the model now.

    Notes
    -----
    Memory: the deltas, on their weights' devices. A switch writes the base values of the one task
    and the values of the other: no allocation that grows with the model, no wait on a GPU. It
    compares nothing but version counters: when torch has written one of the weights since, the
    active delta's coordinates are compared bit for bit first.

    Examples
    --------
    >>> import torch, piece_ops
    >>> base, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> tasks = piece_ops.TaskSwitch(base, {"mail": piece_ops.diff(base, tuned)})
    >>> tasks.switch_("mail")
    >>> torch.equal(base.weight, tuned.weight)
    True
    >>> tasks.switch_(None)
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        where = "piece_ops.TaskSwitch"
        weights = live.parameters_of(model, where)
        self._plans: dict[str, _Plan] = {}
        for task, delta in deltas.items():
            live.check_structure(delta, weights, True, where)
            chosen = live.chosen_weights(delta, weights, where)
            held = live.read(chosen, delta.indices)
            live.check_held(delta, held, delta.base_values, delta.values, where)
            live.check_fingerprint(delta, weights, {}, where)
            self._plans[task] = _Plan(model, delta, weights)
        self.active: str | None = None

    def switch_(self, task: str | None) -> None:
        """Put a task's delta into the model, or none: take out the active one first.

        Raises
        ------
        KeyError
            When there is no such task.
        ValueError
            When the model's parameters have been replaced or cast, or the active delta's
            coordinates written by somebody else. The model is then as it was.
        """
        if task is not None and task not in self._plans:
            raise KeyError(
                f"piece_ops.TaskSwitch.switch_: task must be one of {list(self._plans)} or None, "
                f"got {task!r}"
            )
        where = "piece_ops.TaskSwitch.switch_"
        leaving, coming = (None if n is None else self._plans[n] for n in (self.active, task))
        for plan in (leaving, coming):
            if plan is not None:
                plan.check_live(where)
        if leaving is not None:
            if not leaving.is_untouched():
                delta = leaving.delta
                held = live.read(leaving.weights(), delta.indices)
                live.check_held(delta, held, delta.values, delta.base_values, where)
            leaving.write(leaving.delta.base_values)
        self.active = None
        if coming is not None:
            coming.write(coming.delta.values)
        self.active = task


class _Plan:
    """One delta bound to a model: on its weights' devices, in lists, with the parameters."""

    def __init__(self, model: nn.Module, delta: Delta, weights: Mapping[str, Tensor]) -> None:
        moved: dict[str, Any] = {
            kind: {name: t.to(weights[name].device) for name, t in getattr(delta, kind).items()}
            for kind in ("indices", "values", "base_values")
        }
        self.delta = replace(delta, **moved)
        owners = owners_of(model, list(delta.indices))
        self._owners = [owners[name][0] for name in delta.indices]
        self._weights = [weights[name] for name in delta.indices]
        self._forms = [(weight.dtype, weight.device) for weight in self._weights]
        devices = {weight.device for weight in self._weights}
        self._groups = [[w.device == device for w in self._weights] for device in devices]
        self._versions: list[int] = []

    def check_live(self, where: str) -> None:
        """Raise ValueError when a parameter is no longer the model's, or another dtype or place."""
        found = [module._parameters.get(attribute) for module, attribute in self._owners]
        forms = [(weight.dtype, weight.device) for weight in self._weights]
        is_wrapped = any(is_injected(module) for module, _ in self._owners)
        if all(map(is_, found, self._weights)) and forms == self._forms and not is_wrapped:
            return
        raise ValueError(
            f"{where}: the model must keep the parameters, dtypes and devices that it had when the "
            "TaskSwitch was made, and not be wrapped by a PieceModel; make a new one"
        )

    def is_untouched(self) -> bool:
        """Whether torch has written none of the weights since `write`."""
        return self._versions == [weight._version for weight in self._weights]

    def weights(self) -> dict[str, Tensor]:
        """The weights that the delta changes."""
        return dict(zip(self.delta.indices, self._weights, strict=True))

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write values at the delta's positions and remember that nobody else has."""
        columns = (self._weights, list(self.delta.indices.values()), list(values.values()))
        for group in self._groups:
            scatter_(*(list(compress(column, group)) for column in columns))
        self._versions = [weight._version for weight in self._weights]
