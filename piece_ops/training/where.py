"""Where selections lie and what they share, as sections of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from piece_ops.delta.algebra import common
from piece_ops.selection import Selection, split_name
from piece_ops.training import figures
from piece_ops.training.blocks import Figure, Section, Table, ticks
from piece_ops.training.figures import shorten
from piece_ops.training.reading import Run
from piece_ops.training.transfer import mean


@dataclass(frozen=True)
class Places:
    """Where selections lie, by layer and by kind of module (see `piece_ops.selection.Report`).

    Attributes
    ----------
    layers, kinds : list of str
        In the model's order; kinds with the most chosen first.
    chosen : rows of float or None
        For every layer and kind the coordinates chosen, in the mean over the selections; None where
        a layer has no such module.
    """

    layers: list[str]
    kinds: list[str]
    chosen: list[list[float | None]]


def places(selections: Sequence[Selection]) -> Places:
    """Count where `selections` (at least one) lie."""
    counts: dict[tuple[str, str], float] = {}
    for name in selections[0].shapes:
        layer, kind = split_name(name)
        cell = (layer or "(no layer)", kind)
        counts.setdefault(cell, 0.0)
        for selection in selections:
            if name in selection.indices:
                counts[cell] += selection.indices[name].numel() / len(selections)
    layers = sorted(dict.fromkeys(layer for layer, _ in counts), key=lambda x: x == "(no layer)")
    sums: dict[str, float] = {}
    for (_, kind), count in counts.items():
        sums[kind] = sums.get(kind, 0.0) + count
    kinds = sorted(sums, key=lambda kind: -sums[kind])
    return Places(
        layers, kinds, [[counts.get((layer, kind)) for kind in kinds] for layer in layers]
    )


def shared(first: Selection, second: Selection) -> int:
    """Count the coordinates that two selections have in common."""
    return sum(
        common(first.indices[name], second.indices[name])[0].numel()
        for name in first.indices
        if name in second.indices
    )


def jaccard(both: int, first: int, second: int) -> float:
    """Return the shared coordinates over all that either has; NaN when neither has any."""
    either = first + second - both
    return both / either if either else math.nan


MOST_KINDS = 16
"""Columns of the heat map of places; beyond, the least chosen kinds are put together."""


def _kind(name: str) -> str:
    """Leave out what nearly all names end with."""
    return name.removesuffix(".weight")


def where_section(run: Run) -> Section:
    """Show the layers and kinds of modules that the selections (at least one) lie in."""
    selections = [selection for _, selection in run.selections]
    found = places(selections)
    names, kinds = [name for name, _ in run.selections], [_kind(kind) for kind in found.kinds]
    cells = found.chosen
    if len(kinds) > MOST_KINDS:
        kinds = [*kinds[: MOST_KINDS - 1], f"{len(kinds) - MOST_KINDS + 1} others"]
        rest = ([v for v in row[MOST_KINDS - 1 :] if v is not None] for row in cells)
        sums = [sum(values) if values else None for values in rest]
        cells = [[*row[: MOST_KINDS - 1], last] for row, last in zip(cells, sums, strict=True)]
    prefixes = {layer.rpartition(".")[0] for layer in found.layers if layer[-1].isdigit()}
    short = [
        layer.rpartition(".")[2] if len(prefixes) == 1 else shorten(layer) for layer in found.layers
    ]
    png = figures.heat_map(
        cells,
        short,
        [shorten(kind, 22) for kind in kinds],
        scale="chosen, mean of the tasks",
        row_title="layer",
        log=True,
    )
    reports = [selection.report() for selection in selections]
    shares = [{row.group: row for row in report.by_module} for report in reports]
    every = sum(selection.k for selection in selections) or 1
    rows = []
    for kind in found.kinds:
        of_kind = [share[kind] for share in shares]
        density = mean([row.density for row in of_kind]) or 0.0
        share = sum(row.chosen for row in of_kind) / every
        line = [
            _kind(kind),
            f"{of_kind[0].elements:,}",
            f"{100 * share:.2f}",
            f"{100 * density:.4f}",
        ]
        rows.append([*line, *(f"{100 * row.share:.2f}" for row in of_kind)])
    header = ["module", "elements", "share %", "density %", *names]
    caption = (
        "Share of each kind of module in all that was chosen; density: of its own elements (last "
        "columns: share in % by task)"
    )
    layers = [
        [row[0].group, *(f"{100 * part.share:.2f}" for part in row)]
        for row in zip(*(report.by_layer for report in reports), strict=True)
    ]
    top = ", ".join(f"{line[0]} {line[2]} %" for line in rows[:3])
    alt = (
        f"Heat map on a logarithmic scale: {len(found.layers)} layers by {len(kinds)} kinds of "
        f"modules. Most of what was chosen lies in {top}; see the table."
    )
    figure = Figure("where", alt, "Logarithmic colours. Grey: nothing chosen.", png)
    return Section(
        "Where the selected coordinates lie",
        "",
        [figure],
        [
            Table(caption, header, rows),
            Table("Share of each layer in %, by task", ["layer", *names], layers, is_folded=True),
        ],
    )


def overlap_section(run: Run) -> Section:
    """Show how much every two selections share."""
    names = [name for name, _ in run.selections]
    selections = [selection for _, selection in run.selections]
    count = len(selections)
    both = [
        [selection.k if i == j else 0 for j in range(count)]
        for i, selection in enumerate(selections)
    ]
    for i in range(count):
        for j in range(i):
            both[i][j] = both[j][i] = shared(selections[i], selections[j])
    parts = [
        [jaccard(both[i][j], both[i][i], both[j][j]) for j in range(count)] for i in range(count)
    ]
    apart: list[list[float | None]] = [
        [None if i == j or math.isnan(part) else 100 * part for j, part in enumerate(row)]
        for i, row in enumerate(parts)
    ]
    png = figures.heat_map(
        apart,
        [shorten(name) for name in names],
        ticks(names),
        scale="shared / in either, %",
        texts=[["" if v is None else f"{v:.1f}" for v in row] for row in apart],
    )
    known = [v for row in apart for v in row if v is not None]
    extremes = f"from {min(known):.1f} to {max(known):.1f} %" if known else "not known"
    alt = f"Heat map: how much of what two tasks selected is the same, {extremes}; see the table."
    caption = "Jaccard index: coordinates in both selections over those in either."
    rows = [
        [
            name,
            *(
                f"{n:,}" if i == j or math.isnan(p) else f"{n:,} ({100 * p:.2f} %)"
                for j, (n, p) in enumerate(zip(both[i], parts[i], strict=True))
            ),
        ]
        for i, name in enumerate(names)
    ]
    table = Table(
        "Shared coordinates, and their share of those in either (on the diagonal: all of the task)",
        ["task", *names],
        rows,
    )
    density = mean([selection.density for selection in selections]) or 0.0
    chance = 100 * density / (2 - density)
    text = (
        f"Two random selections of this density would share about {chance:.2g} % of those in "
        "either."
    )
    return Section(
        "Overlap of the selections", text, [Figure("overlap", alt, caption, png)], [table]
    )
