"""What a delta holds, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from piece_ops._text import format_table

if TYPE_CHECKING:
    from piece_ops.delta.record import Delta


@dataclass(frozen=True)
class DeltaRow:
    """One changed parameter; magnitudes in float64, over its changed coordinates."""

    name: str
    elements: int
    changed: int
    share: float  # of all coordinates of the delta
    mean_change: float  # mean of |value - base value|
    largest_change: float  # greatest |value - base value|
    relative_change: float  # root of sum (value - base value)^2 / sum (base value)^2
    bytes: int  # in the delta's file


@dataclass(frozen=True)
class Summary:
    """What a delta holds; ``print(summary)`` shows it.

    Attributes
    ----------
    title : str
        The delta in one line, and its names.
    rows : tuple of DeltaRow
        One for each changed parameter, in the model's order.
    """

    title: str
    rows: tuple[DeltaRow, ...]

    def __str__(self) -> str:
        head = [
            "parameter",
            "changed",
            "share %",
            "density %",
            "mean |d|",
            "max |d|",
            "rel. d",
            "KB",
        ]
        rows = [
            [
                row.name,
                f"{row.changed:,}",
                f"{100 * row.share:.2f}",
                f"{100 * row.changed / row.elements:.4f}",
                f"{row.mean_change:.3g}",
                f"{row.largest_change:.3g}",
                f"{row.relative_change:.3g}",
                f"{row.bytes / 1000:.1f}",
            ]
            for row in self.rows
        ]
        return f"{self.title}\n\n{format_table(head, rows)}" if rows else self.title


def summary(delta: Delta) -> Summary:
    """See `Delta.show`."""
    rows = []
    for name, positions in delta.indices.items():
        before = delta.base_values[name].to(torch.float64)
        change = delta.values[name].to(torch.float64) - before
        elements, changed = math.prod(delta.shapes[name]), positions.numel()
        width = (4 if elements < 2**31 else 8) + 2 * delta.dtypes[name].itemsize
        rows.append(
            DeltaRow(
                name=name,
                elements=elements,
                changed=changed,
                share=changed / delta.k,
                mean_change=float(change.abs().mean()),
                largest_change=float(change.abs().max()),
                relative_change=float(change.norm() / before.norm()),
                bytes=changed * width,
            )
        )
    lines = [repr(delta)]
    for label, text in (("base", delta.base), ("method", delta.method), ("parent", delta.parent)):
        if text:
            lines.append(f"{label}: {text}")
    lines.append(f"content: {sum(row.bytes for row in rows):,} bytes")
    return Summary("\n".join(lines), tuple(rows))
