"""Many tasks on one live model: checked once, then a switch is one pass of 2 k writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor, nn

from piece_ops._inject import is_injected, owners_of
from piece_ops.backends import KEPT_SCATTERS
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
    Memory: a copy of the deltas, on their weights' devices. A switch writes the base values of the
    one task and the values of the other: no allocation that grows with the model, no wait on a GPU.
    It compares nothing but the weights' addresses and version counters: when somebody has written
    one of them since, the bits that the active delta left, and those that the other one will
    replace, are compared first.

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
        for delta in deltas.values():
            live.check_structure(delta, weights, True, where)
            chosen = live.chosen_weights(delta, weights, where)
            held = live.read(chosen, delta.indices)
            live.check_held(delta, held, delta.base_values, delta.values, where)
            live.check_fingerprint(delta, weights, {}, where)
        self._deltas = {task: _copied(delta, weights) for task, delta in deltas.items()}
        self._bound = _Bound(model, weights, self._deltas)
        self.active: str | None = None

    def switch_(self, task: str | None) -> None:
        """Put a task's delta into the model, or none: take out the active one first.

        Raises
        ------
        KeyError
            When there is no such task.
        ValueError
            When the model's parameters have been replaced or cast, or coordinates of the two deltas
            written by somebody else. The model is then as it was.
        """
        if task is not None and task not in self._deltas:
            raise KeyError(
                f"piece_ops.TaskSwitch.switch_: task must be one of {list(self._deltas)} or None, "
                f"got {task!r}"
            )
        where = "piece_ops.TaskSwitch.switch_"
        self._bound.check_live(where)
        if not self._bound.is_untouched():
            self._check_bits(task, where)
        self._bound.write(self.active, task)
        self.active = task

    def _check_bits(self, task: str | None, where: str) -> None:
        """Raise ValueError unless the model is the base with the active delta, where it matters."""
        if self.active is not None:
            delta = self._deltas[self.active]
            held = live.read(self._bound.weights_of(delta), delta.indices)
            live.check_held(delta, held, delta.values, delta.base_values, where)
        if task is not None:
            delta = self._deltas[task]
            self._bound.write(self.active, None)
            held = live.read(self._bound.weights_of(delta), delta.indices)
            self._bound.write(None, self.active)
            live.check_held(delta, held, delta.base_values, delta.values, where)


def _copied(delta: Delta, weights: Mapping[str, Tensor]) -> Delta:
    """On the weights' devices, in tensors that nobody else can write."""
    parts: dict[str, Any] = {
        kind: {name: t.to(weights[name].device, copy=True) for name, t in given.items()}
        for kind, given in (
            ("indices", delta.indices),
            ("values", delta.values),
            ("base_values", delta.base_values),
        )
    }
    return replace(delta, **parts)


class _Bound:
    """The weights that some delta changes, and what each delta writes into them."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], deltas: Mapping[str, Delta]
    ) -> None:
        self._deltas = deltas
        changed = {name for delta in deltas.values() for name in delta.indices}
        self._names = [name for name in weights if name in changed]
        owners = owners_of(model, self._names)
        self._owners = [owners[name][0] for name in self._names]
        self._modules = list({id(module): module for module, _ in self._owners}.values())
        self._weights = [weights[name] for name in self._names]
        self._forms = self._forms_now()
        self._keep()
        self._remember()

    def check_live(self, where: str) -> None:
        """Raise ValueError when a parameter is no longer the model's, or of another form."""
        found = [module._parameters.get(attribute) for module, attribute in self._owners]
        if (
            all(map(is_, found, self._weights))
            and self._forms_now() == self._forms
            and not any(map(is_injected, self._modules))
        ):
            return
        raise ValueError(
            f"{where}: the model must keep the parameters, dtypes and devices that it had when the "
            "TaskSwitch was made, and not be wrapped by a PieceModel; make a new one"
        )

    def is_untouched(self) -> bool:
        """Whether nobody has written or moved one of the weights since `write`."""
        return self._versions == self._versions_now() and self._addresses == self._addresses_now()

    def weights_of(self, delta: Delta) -> dict[str, Tensor]:
        """The weights that one delta changes."""
        weights = dict(zip(self._names, self._weights, strict=True))
        return {name: weights[name] for name in delta.indices}

    def write(self, leaving: str | None, coming: str | None) -> None:
        """Base values of the one, then values of the other; remember that nobody else has."""
        if self._addresses != self._addresses_now():
            self._keep()
        for scatters, kept in self._kept:
            scatters.write(kept["base_values", leaving], kept["values", coming])
        self._remember()

    def _keep(self) -> None:
        """Bind every delta to the weights where they are now, for each device."""
        self._kept: list[tuple[Any, dict[tuple[str, str | None], Any]]] = []
        for device in {weight.device for weight in self._weights}:
            places = [i for i, weight in enumerate(self._weights) if weight.device == device]
            targets = [self._weights[i].detach() for i in places]
            names = [self._names[i] for i in places]
            scatters = KEPT_SCATTERS.get(device.type, _Scatters)(targets)
            kept: dict[tuple[str, str | None], Any] = {}
            for kind in _KINDS:
                for task in (None, *self._deltas):
                    delta = None if task is None else self._deltas[task]
                    kept[kind, task] = scatters.keep(*_lists(delta, kind, names, targets))
            self._kept.append((scatters, kept))

    def _remember(self) -> None:
        self._versions, self._addresses = self._versions_now(), self._addresses_now()

    def _forms_now(self) -> list[Any]:
        return [
            *((weight.dtype, weight.device) for weight in self._weights),
            *map(Tensor.numel, self._weights),
            *map(Tensor.is_contiguous, self._weights),
        ]

    def _versions_now(self) -> list[int]:
        return [weight._version for weight in self._weights]

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._weights))


_Kind = Literal["values", "base_values"]
_KINDS: tuple[_Kind, ...] = ("values", "base_values")


def _lists(
    delta: Delta | None, kind: _Kind, names: Sequence[str], targets: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Positions and values of a delta for each of some weights; none where it changes nothing."""
    indices: Mapping[str, Tensor] = delta.indices if delta else {}
    values: Mapping[str, Tensor] = getattr(delta, kind) if delta else {}
    empty = [target.new_empty(0) for target in targets]
    return (
        [indices.get(n, e.to(torch.int64)) for n, e in zip(names, empty, strict=True)],
        [values.get(n, e) for n, e in zip(names, empty, strict=True)],
    )


class _Scatters:
    """As `CpuScatters`, for any device: one call for each list."""

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self._targets = targets

    def keep(self, indices: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """Without the targets that have no positions."""
        columns = (self._targets, indices, values)
        rows = [row for row in zip(*columns, strict=True) if row[1].numel()]
        return tuple(list(column) for column in zip(*rows, strict=True)) or ([], [], [])

    def write(self, first: tuple[list[Tensor], ...], second: tuple[list[Tensor], ...]) -> None:
        """Write both, the second over the first."""
        for targets, indices, values in (first, second):
            scatter_(targets, indices, values)
