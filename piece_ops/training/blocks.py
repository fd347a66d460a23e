"""What a report is made of: sections of figures, tables and facts; all text is plain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from piece_ops.training.figures import shorten


@dataclass(frozen=True)
class Figure:
    """A picture: `name` for its file, `alt` for those who do not see it."""

    name: str
    alt: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row is its heading. A folded one opens by a click."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False


@dataclass(frozen=True)
class Section:
    """One part of the report: `facts` are (name, value, definition)."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str, str]] = ()


DEFINITIONS = {
    "learned": "mean score of each task right after its own training",
    "OP": "overall performance: mean score of the tasks learned so far, after the last of them",
    "BWT": "backward transfer: mean change of the earlier tasks' scores since each was learned, in "
    "points; below zero is forgetting",
    "FWT": "forward transfer: mean rise over the base model of each task's score just before its "
    "own training, in points",
    "forgetting": "mean fall of the earlier tasks from the best score since their own training, in "
    "points",
    "gain": "mean rise of each task's score by its own training, over the base model, in points",
    "d": "general drift: mean rise of the logarithm of the perplexity of the general texts, the "
    "price in general ability",
    "log perplexity": "mean over the general texts of the logarithm of the perplexity at the end",
}


def numbered(names: Iterable[str]) -> list[str]:
    """Put their places before names, as the figures and tables show tasks."""
    return [f"{i} {name}" for i, name in enumerate(names, start=1)]


def ticks(names: Sequence[str]) -> list[str]:
    """Shorten numbered names for the axis of a figure: many of them to their numbers."""
    return [name.split(" ")[0] if len(names) > 12 else shorten(name) for name in names]


def rows_of(names: Sequence[str], cells: Iterable[Sequence[str]]) -> list[list[str]]:
    """Put a name before each line of cells."""
    return [[name, *line] for name, line in zip(names, cells, strict=True)]
