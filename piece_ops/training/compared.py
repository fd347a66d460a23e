"""What the report says of several runs: their numbers side by side, and gain against its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from piece_ops.training import figures
from piece_ops.training.blocks import DEFINITIONS, Figure, Section, Table
from piece_ops.training.reading import Run
from piece_ops.training.report import nats, percent, points
from piece_ops.training.sections import gain

Point = tuple[float, float]


def labels(runs: Sequence[Run]) -> list[str]:
    """Name each run by its method, learning rate and whatever else differs; by its folder if equal.

    Returns
    -------
    list of str
        All different.
    """
    settings = [run.results.settings.as_dict() for run in runs]
    others = [
        key
        for key in settings[0]
        if key not in ("method", "lr") and any(s[key] != settings[0][key] for s in settings)
    ]
    found = []
    for run, values in zip(runs, settings, strict=True):
        parts = [values["method"], f"lr {values['lr']:g}"]
        parts += [f"{key} {values[key]}" for key in others]
        if not run.is_whole:
            parts.append(f"{run.reached} of {len(run.results.tasks)} tasks")
        found.append(", ".join(parts))
    return [
        f"{label} ({run.name}, {i})" if found.count(label) > 1 else label
        for i, (label, run) in enumerate(zip(found, runs, strict=True), start=1)
    ]


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
    """Return the section that compares runs; only whole ones are in the figures."""
    names = labels(runs)
    summaries = [run.results.summary() for run in runs]
    gains = [gain(run.results) for run in runs]
    fronts: dict[str, list[bool]] = {}
    pictures = []
    for kind, key, title, unit in PRICES:
        found: list[Point | None] = []
        for run, summary, gained in zip(runs, summaries, gains, strict=True):
            price = summary[key]
            if run.is_whole and price is not None and gained is not None:
                found.append((unit * price, 100 * gained))
            else:
                found.append(None)
        fronts[kind] = front(found)
        if any(found):
            pictures.append(_picture(kind, title, runs, found))
    rows = [
        [
            name,
            percent(summary["accuracy_final"]),
            *(points(summary[f"accuracy_{x}_transfer"]) for x in ("backward", "forward")),
            points(summary["accuracy_forgetting"]),
            points(gained),
            nats(summary["log_perplexity_drift"], sign=True),
            *("yes" if fronts[kind][i] else "" for kind, *_ in PRICES),
            f"{_minutes(run):.1f}",
            f"{run.results.peak_rss_bytes / 1e9:.2f}" if run.results.peak_rss_bytes else "-",
        ]
        for i, (name, run, summary, gained) in enumerate(
            zip(names, runs, summaries, gains, strict=True)
        )
    ]
    header = ["run", "OP", "BWT", "FWT", "forgetting", "gain", "d", "front: forgetting"]
    header += ["front: d", "minutes", "GB"]
    table = Table("After the last task (OP in %, changes in points, d in nats)", header, rows)
    text = (
        "Up and to the left is better. Front: no other run gains at least as much for at most the "
        "same price."
    )
    return Section("The runs compared", " ".join([text, *_doubts(runs)]), pictures, [table])


def definitions() -> Section:
    """Return the section that says what the columns of `compare` mean."""
    used = ("OP", "BWT", "FWT", "forgetting", "gain", "d")
    return Section("What the numbers mean", facts=[(name, "", DEFINITIONS[name]) for name in used])


def _picture(kind: str, title: str, runs: Sequence[Run], found: Sequence[Point | None]) -> Figure:
    """Draw gain against one price, the learning rates of a method joined."""
    kept = [(run.results.settings, at) for run, at in zip(runs, found, strict=True) if at]
    best = sorted(at for at, first in zip(found, front(found), strict=True) if at and first)
    # One line through the learning rates of runs that are otherwise the same.
    groups: dict[tuple[str, str], list[tuple[float, Point]]] = {}
    for settings, at in kept:
        others = {key: value for key, value in settings.as_dict().items() if key != "lr"}
        groups.setdefault((settings.method, str(others)), []).append((settings.lr, at))
    few = len(kept) <= MOST_LABELS
    png = figures.scatter(
        [
            (method, [(*at, f"{lr:g}" if few or at in best else "") for lr, at in sorted(group)])
            for (method, _), group in groups.items()
        ],
        front=best,
        x_title=title,
        y_title="gain, points",
    )
    methods = ", ".join(dict.fromkeys(method for method, _ in groups))
    alt = (
        f"Gain against {kind}: one point for each of {len(kept)} runs of "
        f"{methods}; the numbers are in the table."
    )
    return Figure(
        f"gain-{kind}", alt, "Beside the points: learning rates. Grey steps: the front.", png
    )


def _minutes(run: Run) -> float:
    every = [run.results.base_seconds, *(task.seconds for task in run.results.tasks)]
    return sum(sum(seconds.values()) for seconds in every) / 60


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
