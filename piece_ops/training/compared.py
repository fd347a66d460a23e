"""What the report says of several runs: their numbers side by side, and gain against its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from piece_ops.training import figures
from piece_ops.training.blocks import DEFINITIONS, Figure, Section, Table
from piece_ops.training.reading import Run
from piece_ops.training.report import nats, percent, points
from piece_ops.training.variants import Numbers, Variant, labels, numbers, variants

Point = tuple[float, float]


def front(found: Sequence[Point | None]) -> list[bool]:
    """Tell which points (price, gain) no other one beats in one and equals in the other.

    Examples
    --------
    >>> front([(0.1, 0.5), (0.2, 0.5), (0.3, 0.9), None])
    [True, False, True, False]
    """

    def beats(a: Point, b: Point) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    known = [point for point in found if point is not None]
    return [
        point is not None and not any(beats(other, point) for other in known) for point in found
    ]


MOST_LABELS = 14
"""Points beyond which only those on the front have their learning rate beside them."""

PRICES = (
    ("forgetting", "accuracy_forgetting", "forgetting, points", 100.0),
    ("drift", "log_perplexity_drift", "general drift d, nats", 1.0),
)
"""What a gain is set against: name, number of `Results.summary`, title of the axis, its unit."""


def compare(runs: Sequence[Run]) -> Section:
    """Return the section that compares runs, seeds averaged; only whole ones are in the figures."""
    kinds = variants(runs)
    fronts: dict[str, list[bool]] = {}
    pictures = []
    for kind, key, title, unit in PRICES:
        found = [_point(of.numbers, key, unit) if of.is_whole else None for of in kinds]
        fronts[kind] = front(found)
        if any(found):
            pictures.append(_picture(kind, title, kinds, found, key, unit))
    has_seeds = len(kinds) < len(runs)
    rows = [
        [
            of.label,
            *([str(len(of.runs))] if has_seeds else []),
            *_cells(of.numbers),
            *("yes" if fronts[kind][i] else "" for kind, *_ in PRICES),
        ]
        for i, of in enumerate(kinds)
    ]
    fronts_too = [f"front: {kind if kind != 'drift' else 'd'}" for kind in fronts]
    header = ["run", *(["seeds"] if has_seeds else []), *COLUMNS, *fronts_too]
    caption = "After the last task (OP in %, changes in points, d in nats"
    tables = [Table(caption + (", means over the seeds)" if has_seeds else ")"), header, rows)]
    if has_seeds:
        each = [[name, *_cells(numbers(run))] for name, run in zip(labels(runs), runs, strict=True)]
        tables.append(Table("The same of every run", ["run", *COLUMNS], each, is_folded=True))
    text = (
        "Up and to the left is better. Front: no other run gains at least as much for at most the "
        "same price."
    )
    return Section("The runs compared", " ".join([text, *_doubts(runs)]), pictures, tables)


COLUMNS = ("OP", "BWT", "FWT", "forgetting", "gain", "d", "log perplexity", "minutes", "GB")


def _cells(found: Numbers) -> list[str]:
    """Write the numbers under `COLUMNS`."""
    minutes, size = found["minutes"], found["bytes"]
    return [
        percent(found["accuracy_final"]),
        *(points(found[f"accuracy_{x}_transfer"]) for x in ("backward", "forward")),
        points(found["accuracy_forgetting"]),
        points(found["gain"]),
        nats(found["log_perplexity_drift"], sign=True),
        nats(found["log_perplexity"]),
        f"{minutes:.1f}",
        f"{size / 1e9:.2f}" if size else "-",
    ]


def _point(found: Numbers, key: str, unit: float) -> Point | None:
    price, gained = found[key], found["gain"]
    return None if price is None or gained is None else (unit * price, 100 * gained)


def definitions() -> Section:
    """Return the section that says what the columns of `compare` mean."""
    used = ("OP", "BWT", "FWT", "forgetting", "gain", "d", "log perplexity")
    return Section("What the numbers mean", facts=[(name, "", DEFINITIONS[name]) for name in used])


def _picture(
    kind: str,
    title: str,
    kinds: Sequence[Variant],
    found: Sequence[Point | None],
    key: str,
    unit: float,
) -> Figure:
    """Draw gain against one price, the learning rates of a series joined, its seeds beside it."""
    kept = [(of, at) for of, at in zip(kinds, found, strict=True) if at]
    best = sorted(at for at, first in zip(found, front(found), strict=True) if at and first)
    groups: dict[str, list[tuple[float, Point]]] = {}
    seeds: list[tuple[str, Point]] = []
    for of, at in kept:
        groups.setdefault(of.series, []).append((of.lr, at))
        if len(of.runs) > 1:
            each = [_point(numbers(run), key, unit) for run in of.runs]
            seeds += [(of.series, point) for point in each if point]
    few = len(kept) <= MOST_LABELS
    png = figures.scatter(
        [
            (name, [(*at, f"{lr:g}" if few or at in best else "") for lr, at in sorted(group)])
            for name, group in groups.items()
        ],
        front=best,
        x_title=title,
        y_title="gain, points",
        beside=seeds,
    )
    every = sum(len(of.runs) for of, _ in kept)
    alt = (
        f"Gain against {kind}: one point for each of {len(kept)} kinds of {every} runs of "
        f"{', '.join(groups)}; the numbers are in the table."
    )
    caption = "Beside the points: learning rates. Grey steps: the front."
    if seeds:
        caption += " Large: means over the seeds; small: each seed."
    return Figure(f"gain-{kind}", alt, caption, png)


def _doubts(runs: Sequence[Run]) -> list[str]:
    """Say in what the runs differ so that their numbers do not compare."""

    def differ(what: Any) -> bool:
        return any(what(run) != what(runs[0]) for run in runs)

    found = []
    if differ(lambda run: run.results.model):
        found.append("base models")
    if differ(lambda run: [(t.name, t.metric) for t in run.results.tasks]):
        found.append("tasks")
    if differ(lambda run: [(t.held_out_split, t.held_out_rows) for t in run.results.tasks]):
        found.append("held-out rows")
    if differ(lambda run: [(t.name, t.tokens) for t in run.results.texts]):
        found.append("general texts")
    doubts = []
    if found:
        doubts.append(f"The runs have different {', '.join(found)}: mind what you compare.")
    if not all(run.is_whole for run in runs):
        doubts.append("Runs that have not learned all their tasks are not in the figures.")
    return doubts
