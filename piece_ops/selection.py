"""Which coordinates of which parameters were chosen: the result of an importance pass.

A `Selection` is plain data: positions by parameter name. It knows nothing of the model but names
and shapes, so it can be saved, looked at and used on another machine.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops._files import read_tensors, write_tensors

_FORMAT, _VERSION = "piece_ops.selection", 1
_SUFFIX = ".indices"


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen coordinates of a model.

    Parameters
    ----------
    indices : dict of str to Tensor, int64, shape [k_t]
        Per parameter name (as in ``model.named_parameters()``) the flat positions in the
        parameter's row-major order, strictly increasing, at least one each.
    shapes : dict of str to tuple of int
        Shapes of the parameters that could have been chosen; at least those in `indices`.
    total : int
        N, the number of parameters of the model (what the density is a share of).
    method : str
        How they were chosen.
    threshold : float
        The smallest score taken, on the scale of the method's formula (means over samples);
        NaN when unknown, infinite when nothing was taken.

    Raises
    ------
    ValueError, TypeError
        When positions are not strictly increasing, out of range, of another dtype, or when a name
        has no shape.

    Examples
    --------
    >>> import torch
    >>> chosen = Selection({"weight": torch.tensor([1, 5])}, {"weight": (2, 4)}, total=8)
    >>> chosen.k, chosen.density
    (2, 0.25)
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    total: int
    method: str = "custom"
    threshold: float = math.nan
    k: int = field(init=False)

    def __post_init__(self) -> None:
        where = "piece_ops.Selection"
        shapes = {name: tuple(int(d) for d in shape) for name, shape in self.shapes.items()}
        for name, positions in self.indices.items():
            if name not in shapes:
                raise ValueError(f"{where}: every parameter needs its shape, got none for {name!r}")
            check_positions(positions, math.prod(shapes[name]), name, where)
            if positions.numel() == 0:
                raise ValueError(
                    f"{where}: every parameter in indices must have a position, got none for "
                    f"{name!r}; leave it out"
                )
        k = sum(positions.numel() for positions in self.indices.values())
        room = sum(math.prod(shapes[name]) for name in shapes)
        if self.total < room:
            raise ValueError(
                f"{where}: total must be at least {room} (the elements of all shapes), got "
                f"{self.total}"
            )
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "k", k)

    @property
    def density(self) -> float:
        """Share of all N parameters that was chosen, k / total."""
        return self.k / self.total if self.total else 0.0

    @property
    def candidates(self) -> int:
        """Elements of all parameters in `shapes`: what could have been chosen."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __repr__(self) -> str:
        return (
            f"Selection(method={self.method!r}, k={self.k:,} of {self.total:,} "
            f"({100 * self.density:.4g} %), in {len(self.indices)} of {len(self.shapes)} "
            f"parameters, threshold={self.threshold:.4g})"
        )

    def report(self) -> Report:
        """Where the chosen coordinates lie, by layer and by kind of module (see `Report`)."""
        return Report(self)

    def check_fits(self, model: nn.Module) -> None:
        """Raise ValueError when `model` lacks a chosen parameter or has it in another shape."""
        found = {name: tuple(p.shape) for name, p in model.named_parameters()}
        missing = [name for name in self.indices if name not in found]
        wrong = [
            f"{name!r} is {list(found[name])} in the model and {list(self.shapes[name])} here"
            for name in self.indices
            if name in found and found[name] != self.shapes[name]
        ]
        if missing or wrong:
            parts = []
            if missing:
                parts.append(f"{len(missing)} names it lacks: {_some(missing)}")
            if wrong:
                parts.append(f"{len(wrong)} other shapes: {'; '.join(wrong[:5])}")
            raise ValueError(
                "piece_ops.Selection.check_fits: the selection must fit the model, got "
                + " and ".join(parts)
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, atomically.

        One tensor ``<name>.indices`` per parameter, int32 where the parameter has fewer than 2^31
        elements and int64 otherwise: 4 bytes per chosen coordinate.
        """
        tensors = {}
        for name, positions in self.indices.items():
            small = math.prod(self.shapes[name]) < 2**31
            narrow = positions.to("cpu", torch.int32 if small else torch.int64, copy=True)
            tensors[name + _SUFFIX] = narrow
        info = {
            "method": self.method,
            "k": self.k,
            "total": self.total,
            "threshold": repr(self.threshold),  # JSON has no infinity
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        write_tensors(path, tensors, file_format=_FORMAT, version=_VERSION, info=info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read a file of `save`; positions come back as int64.

        Raises
        ------
        FileNotFoundError
            When there is no such file.
        ValueError
            When it is truncated, of another format or version, or its content does not hold
            together (order, range, counts).
        """
        where = "piece_ops.Selection.load"
        info, names, read, _ = read_tensors(
            path, file_format=_FORMAT, version=_VERSION, where=where
        )
        try:
            shapes = {str(name): tuple(shape) for name, shape in info["shapes"].items()}
            total, k, method = int(info["total"]), int(info["k"]), str(info["method"])
            threshold = float(info["threshold"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{where}: the header of {str(path)!r} is incomplete: {error!r}"
            ) from error
        stored = {}
        for key in names:
            positions = read(key)
            if not key.endswith(_SUFFIX) or positions.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{where}: {str(path)!r} must hold int32 or int64 tensors named "
                    f"'<parameter>{_SUFFIX}', got {positions.dtype} {key!r}"
                )
            stored[key.removesuffix(_SUFFIX)] = positions.to(torch.int64)
        # safetensors keeps no order; the model's order is that of the shapes.
        order = {name: place for place, name in enumerate(shapes)}
        indices = {n: stored[n] for n in sorted(stored, key=lambda n: order.get(n, len(order)))}
        try:
            loaded = cls(indices, shapes, total, method, threshold)
        except ValueError as error:
            raise ValueError(f"{where}: {str(path)!r} is damaged: {error}") from error
        if loaded.k != k:
            raise ValueError(
                f"{where}: {str(path)!r} is damaged: it must hold {k} positions, got {loaded.k}"
            )
        return loaded


def check_positions(positions: Any, numel: int, name: str, where: str) -> None:
    """Raise unless `positions` is a 1-D int64 tensor, strictly increasing, in 0 .. numel - 1."""
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"{where}: positions of {name!r} must be an int64 tensor, got {got}")
    if positions.dim() != 1:
        raise ValueError(
            f"{where}: positions of {name!r} must have one dimension, got {list(positions.shape)}"
        )
    if positions.numel() == 0:
        return
    count = positions.numel()
    falls = int((positions[1:] <= positions[:-1]).sum())
    if falls:
        raise ValueError(
            f"{where}: positions of {name!r} must be strictly increasing, got {falls} of {count} "
            "that are not above the one before"
        )
    low, high = int(positions[0]), int(positions[-1])
    if low < 0 or high >= numel:
        outside = int(((positions < 0) | (positions >= numel)).sum())
        raise ValueError(
            f"{where}: positions of {name!r} must be in 0..{numel - 1}, got {low}..{high} "
            f"({outside} of {count} outside)"
        )


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# ----------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class ReportRow:
    """One group of parameters: how many elements it has and how many of them were chosen."""

    group: str
    parameters: int
    elements: int
    chosen: int
    share: float  # of everything chosen
    density: float  # of the group's own elements


class Report:
    """Where a selection lies. ``print(report)`` shows both tables; the rows are plain data.

    Attributes
    ----------
    by_layer : list of ReportRow
        Grouped by the first number in the name and what stands before it (``model.layers.3``);
        parameters without a number are the last group.
    by_module : list of ReportRow
        Grouped by what stands after that number (``self_attn.v_proj.weight``; further numbers,
        those of experts for instance, become ``*``), most chosen first. Names come from the
        model's own parameters; no architecture is built in.
    """

    def __init__(self, selection: Selection) -> None:
        self._title = repr(selection)
        layers: dict[str, list[int]] = {}
        kinds: dict[str, list[int]] = {}
        for name, shape in selection.shapes.items():
            chosen = selection.indices.get(name)
            count = 0 if chosen is None else chosen.numel()
            layer, kind = split_name(name)
            for groups, group in ((layers, layer or "(no layer)"), (kinds, kind)):
                sums = groups.setdefault(group, [0, 0, 0])
                sums[0] += 1
                sums[1] += math.prod(shape)
                sums[2] += count
        self.by_layer = _rows(layers, selection.k)
        self.by_layer.sort(key=lambda row: row.group == "(no layer)")  # stable: model order, rest
        self.by_module = _rows(kinds, selection.k)
        self.by_module.sort(key=lambda row: -row.chosen)

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Both tables as lists of dicts, ready for JSON."""
        tables = {"by_layer": self.by_layer, "by_module": self.by_module}
        return {key: [dict(vars(row)) for row in rows] for key, rows in tables.items()}

    def __str__(self) -> str:
        parts = [self._title]
        for title, rows in (("layer", self.by_layer), ("module", self.by_module)):
            width = max([len(title), *(len(row.group) for row in rows)])
            parts.append("")
            parts.append(f"{title:<{width}}  {'elements':>15}  {'chosen':>13}  share %  density %")
            parts.extend(
                f"{row.group:<{width}}  {row.elements:>15,}  {row.chosen:>13,}  "
                f"{100 * row.share:>7.2f}  {100 * row.density:>9.4f}"
                for row in rows
            )
        return "\n".join(parts)

    __repr__ = __str__


def split_name(name: str) -> tuple[str, str]:
    """Split a parameter's name at its first number: ("model.layers.3", "mlp.up_proj.weight").

    A name without a number has no layer and is its own kind.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            rest = [re.sub(r"^\d+$", "*", later) for later in parts[place + 1 :]]
            return ".".join(parts[: place + 1]), ".".join(rest) or ".".join(parts[:place])
    return "", name


def _rows(groups: Mapping[str, list[int]], k: int) -> list[ReportRow]:
    return [
        ReportRow(
            group=group,
            parameters=count,
            elements=elements,
            chosen=chosen,
            share=chosen / k if k else 0.0,
            density=chosen / elements if elements else 0.0,
        )
        for group, (count, elements, chosen) in groups.items()
    ]
