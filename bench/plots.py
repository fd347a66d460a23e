"""The figures of docs/benchmarks.md, drawn from the rows; one SVG file each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
CaseKey = tuple[str, str]
Draw = Callable[[Any], None]  # on matplotlib axes
PHASES = {
    "importance_ms": "importance",
    "select_ms": "selection",
    "set_up_ms": "set-up",
    "steps_ms": "steps",
    "checkpoint_ms": "checkpoint",
}
AXES = {
    "elements": "elements",
    "density": "share selected",
    "tensors": "tensors",
    "threads": "threads",
}


def plots(cases: dict[CaseKey, list[Line]]) -> Iterator[tuple[CaseKey, str, str, Draw]]:
    """The case that each figure belongs to, its file, what it shows, and how to draw it."""
    for key, lines in cases.items():
        rows = [line for line in lines if line["kind"] == "row" and line["status"] == "ok"]
        file = re.sub(r"[^a-z0-9]+", "-", f"{key[0]} {key[1]}".lower()).strip("-") + ".svg"
        if any("x" in row for row in rows):
            what = f"Time of {key[1]}; crosses: the cost model"
            yield key, file, what, lambda axes, rows=rows, key=key: _sweep(axes, key[1], rows)
        elif any("select_ms" in row.get("figures", {}) for row in rows):
            yield key, file, "Time of each phase", lambda axes, rows=rows: _phases(axes, rows)


def _sweep(axes: Any, name: str, rows: list[Line]) -> None:
    series: dict[str, list[Line]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    for label, of_one in series.items():
        x = [row["x"] for row in of_one]
        is_ours = of_one[0]["role"] == "ours"
        style = {"ours": "o-", "peer": "s-", "floor": "--"}[of_one[0]["role"]]
        axes.plot(x, [row["p50_ms"] for row in of_one], style, label=label, zorder=2 + is_ours)
        predicted = [(row["x"], row["predicted_ms"]) for row in of_one if "predicted_ms" in row]
        if predicted:
            axes.plot(*zip(*predicted, strict=True), "x", color="black", label="cost model")
    kind = next(kind for kind in AXES if f"against {kind}" in name)
    axes.set_xlabel(AXES[kind])
    axes.set_ylabel("ms")
    if kind != "threads":
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_xticks(sorted({row["x"] for row in rows}))
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def phase_seconds(row: Line) -> dict[str, float]:
    """Seconds of each phase; steps: all of them, at their median."""
    figures = dict(row["figures"])
    if "p50_ms" in row:
        figures["steps_ms"] = figures["steps"] * row["p50_ms"]
    return {label: figures.get(key, 0.0) / 1e3 for key, label in PHASES.items()}


def _phases(axes: Any, rows: list[Line]) -> None:
    names = [row["peer"] for row in rows][::-1]
    left = [0.0] * len(names)
    for label in PHASES.values():
        widths = [phase_seconds(row)[label] for row in rows][::-1]
        axes.barh(names, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("seconds")
    axes.legend(frameon=False)


def draw(cases: dict[CaseKey, list[Line]], folder: Path) -> list[Path]:
    """Write every figure; the folder's other SVG files go."""
    import matplotlib

    matplotlib.use("Agg")
    # The same rows give the same file: no date, and ids from a fixed salt.
    settings = {"svg.hashsalt": "piece_ops", "svg.fonttype": "none", "font.size": 9}
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(settings):
        for _key, file, _what, on in plots(cases):
            figure = Figure(figsize=(6.4, 3.6), layout="constrained")
            on(figure.subplots())
            path = folder / file
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            written.append(path)
    for old in set(folder.glob("*.svg")) - set(written):
        old.unlink()
    return written
