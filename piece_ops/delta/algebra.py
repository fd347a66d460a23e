"""Deltas among themselves: what they share, and several as one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from piece_ops._text import format_table
from piece_ops.delta.bits import bits
from piece_ops.delta.fingerprint import stride_of

if TYPE_CHECKING:
    from piece_ops.delta.record import Delta


@dataclass(frozen=True)
class OverlapRow:
    """One parameter: coordinates of each delta, of both, and of both with different values."""

    name: str
    first: int
    second: int
    shared: int
    conflicting: int


@dataclass(frozen=True)
class Overlap:
    """What two deltas have in common; ``print(overlap)`` shows the table.

    Attributes
    ----------
    rows : tuple of OverlapRow
        One for each parameter that either delta changes, most shared first.
    """

    rows: tuple[OverlapRow, ...]

    @property
    def shared(self) -> int:
        """Coordinates that both change."""
        return sum(row.shared for row in self.rows)

    @property
    def conflicting(self) -> int:
        """Coordinates to which the two give different values."""
        return sum(row.conflicting for row in self.rows)

    @property
    def jaccard(self) -> float:
        """Shared coordinates over all that either changes; 0.0 when there are none."""
        either = sum(row.first + row.second - row.shared for row in self.rows)
        return self.shared / either if either else 0.0

    def __str__(self) -> str:
        head = ["parameter", "first", "second", "shared", "conflicting"]
        counts = [[r.first, r.second, r.shared, r.conflicting] for r in self.rows]
        counts.append([sum(row[column] for row in counts) for column in range(4)])
        names = [*(row.name for row in self.rows), "all"]
        rows = [[name, *map("{:,}".format, c)] for name, c in zip(names, counts, strict=True)]
        return format_table(head, rows)


def overlap(first: Delta, second: Delta) -> Overlap:
    """See `Delta.overlap`."""
    _check_same_model(first, second, "piece_ops.Delta.overlap")
    rows = []
    for name in {**first.indices, **second.indices}:
        a, b = first.indices.get(name), second.indices.get(name)
        shared = conflicting = 0
        if a is not None and b is not None:
            here, there = common(a, b)
            differ = bits(first.values[name][here]) != bits(second.values[name][there])
            shared, conflicting = here.numel(), int(differ.sum())
        of_first, of_second = (0 if part is None else part.numel() for part in (a, b))
        rows.append(OverlapRow(name, of_first, of_second, shared, conflicting))
    return Overlap(tuple(sorted(rows, key=lambda row: -row.shared)))


def common(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the common elements of two increasing tensors lie in each of them."""
    places = torch.searchsorted(second, first).clamp_(max=second.numel() - 1)
    here = (second[places] == first).nonzero().reshape(-1)
    return here, places[here]


def _check_same_model(first: Delta, second: Delta, where: str) -> None:
    """Raise ValueError unless both are of models with the same parameters, shapes and dtypes."""
    forms = [{name: (d.dtypes[name], d.shapes[name]) for name in d.shapes} for d in (first, second)]
    odd = [n for n in {**forms[0], **forms[1]} if forms[0].get(n) != forms[1].get(n)]
    if odd:
        name = odd[0]
        raise ValueError(
            f"{where}: both deltas must be of models with the same parameters, shapes and dtypes, "
            f"got {len(odd)} that differ, first {name!r}: {forms[0].get(name, 'missing')} and "
            f"{forms[1].get(name, 'missing')}"
        )


def _check_follows(first: Delta, second: Delta, where: str) -> None:
    """Raise ValueError when the second delta is known to be made on another model than that of
    the first with the first applied.
    """
    tip = first.tip or first.digest
    if second.parent and second.parent != tip:
        raise ValueError(
            f"{where}: the second delta must have been made on what the first one leaves, "
            f"{tip[:12]}, got one made on top of the delta {second.parent[:12]}"
        )
    # Without a parent's name: the fingerprint must have changed if a sampled element has.
    is_seen = any(
        bool(
            (
                (positions % stride_of(math.prod(first.shapes[name])) == 0)
                & (bits(first.values[name]) != bits(first.base_values[name]))
            ).any()
        )
        for name, positions in first.indices.items()
    )
    if is_seen and second.fingerprint == first.fingerprint:
        raise ValueError(
            f"{where}: the second delta must have been made on what the first one leaves, got one "
            "made on the first one's own base (they have one fingerprint)"
        )


def then(first: Delta, second: Delta) -> Delta:
    """See `Delta.then`."""
    where = "piece_ops.Delta.then"
    _check_same_model(first, second, where)
    _check_follows(first, second, where)
    merged: dict[str, Any] = {"indices": {}, "values": {}, "base_values": {}}
    conflicts = {}
    for name in first.shapes:
        a, b = ([d.indices[name]] if name in d.indices else [] for d in (first, second))
        if a and b:
            here, there = common(a[0], b[0])
            wrong = bits(first.values[name][here]) != bits(second.base_values[name][there])
            if count := int(wrong.sum()):
                conflicts[name] = count
        if not (a or b):
            continue
        # Stable, so of a position in both that of the first comes first.
        positions, order = torch.sort(torch.cat(a + b), stable=True)
        new = torch.cat([d.values[name] for d in (first, second) if name in d.values])[order]
        old = torch.cat([d.base_values[name] for d in (first, second) if name in d.values])[order]
        is_first = torch.ones_like(positions, dtype=torch.bool)
        is_first[1:] = positions[1:] != positions[:-1]
        merged["indices"][name] = positions[is_first]
        merged["base_values"][name] = old[is_first]  # of the first delta
        merged["values"][name] = new[is_first.roll(-1)]  # of the second
    if conflicts:
        listed = "; ".join(f"{name!r}: {count}" for name, count in list(conflicts.items())[:5])
        raise ValueError(
            f"{where}: the second delta must have been made on what the first one leaves, got "
            f"other base values at {sum(conflicts.values())} coordinates, in {len(conflicts)} "
            f"tensors ({listed})"
        )
    return replace(
        first,
        **merged,
        method=first.method if first.method == second.method else "",
        task=" + ".join(task for task in (first.task, second.task) if task),
        tip=second.tip or second.digest,
    )
