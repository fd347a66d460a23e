"""Figures as PNG: they know numbers and labels, not what these mean.

All are drawn on an opaque light ground, so that they can be read on a dark page too, and in colours
that colour-blind readers tell apart (Okabe and Ito's, and matplotlib's cividis); lines also differ
in their marks and dashes. The user's own matplotlib settings do not count, so the same numbers give
the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from piece_ops.training.extra import require

WIDTH, DPI = 5.6, 180
"""Inches, and pixels an inch: wide enough for half a laptop's page, narrow enough for a phone."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)))
COLOUR_MAP, MISSING = "cividis", "#e4e4e4"

STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

Row = Sequence[float | None]


def shorten(text: str, most: int = 16) -> str:
    """Cut a name that is too long for a figure in its middle; the tables have it whole.

    Examples
    --------
    >>> shorten("answers_of_the_second_year", 12)
    'answers…year'
    """
    if len(text) <= most:
        return text
    end = (most - 1) * 2 // 5
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def plain(text: str) -> str:
    """Keep matplotlib from reading ``$`` as the start of a formula."""
    return text.replace("$", r"\$")


def picture(height: float, paint: Callable[[Any], None], width: float = WIDTH) -> bytes:
    """Let `paint` fill an empty matplotlib figure; return it as PNG."""
    style = require("matplotlib.style", "the report")
    figures = require("matplotlib.figure", "the report")
    buffer = io.BytesIO()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        # A name in a script that the font lacks shows boxes; the tables have it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = figures.Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def heat_map(
    values: Sequence[Row],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    scale: str,
    row_title: str = "",
    texts: Sequence[Sequence[str]] | None = None,
    limits: tuple[float, float] | None = None,
    log: bool = False,
) -> bytes:
    """Draw a matrix in colours, with numbers in its cells as long as they fit.

    Parameters
    ----------
    values : rows of float or None
        None, and with `log` what is not above 0, is shown in grey.
    rows, columns : sequence of str
        Their names.
    scale : str
        What the colours mean.
    row_title : str
        What the rows are.
    texts : rows of str, optional
        What to write into the cells.
    limits : (float, float), optional
        Values of the darkest and the lightest colour; by default the extremes.
    log : bool
        Logarithmic colours.
    """
    colours = require("matplotlib.colors", "the report")
    colormaps = require("matplotlib", "the report").colormaps
    known = [v for row in values for v in row if v is not None and (v > 0 or not log)]
    low, high = limits or ((min(known), max(known)) if known else (0.0, 1.0))
    if low == high:
        low, high = (low / 2, low * 2) if log else (low - 0.5, high + 0.5)
    norm = (colours.LogNorm if log else colours.Normalize)(low, high)
    shown = [[math.nan if v is None or (log and v <= 0) else v for v in row] for row in values]
    cell = min(0.42, max(0.13, 5.0 / len(rows)))
    turned = _crowded(columns, 44)
    tall = 0.07 * max(map(len, columns)) if turned else 0.2

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        colour_map = colormaps[COLOUR_MAP].with_extremes(bad=MISSING)
        image = axes.imshow(shown, norm=norm, cmap=colour_map, aspect="auto")
        axes.set_xticks(
            range(len(columns)),
            [plain(name) for name in columns],
            rotation=50 if turned else 0,
            ha="right" if turned else "center",
            rotation_mode="anchor",
        )
        # One name in two, three, ... where the rows are narrower than a line of text.
        every = math.ceil(0.15 / (cell * 0.9))
        axes.set_yticks(range(0, len(rows), every), [plain(name) for name in rows[::every]])
        axes.set_ylabel(row_title)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if texts and len(columns) <= 12 and cell >= 0.2:
            for i, line in enumerate(texts):
                for j, text in enumerate(line):
                    dark = not math.isnan(shown[i][j]) and norm(shown[i][j]) < 0.55
                    size = 9 if len(columns) <= 7 else 7
                    colour = "white" if dark else "black"
                    axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
        figure.colorbar(image, ax=axes, label=scale, fraction=0.06, pad=0.02)

    return picture(min(9.0, max(2.4, cell * len(rows) + 0.6) + tall), paint)


def _crowded(names: Sequence[str], room: int) -> bool:
    """Tell whether names, with two letters between them, need more than `room` side by side."""
    return (max(map(len, names)) + 2) * len(names) > room


def lines(
    series: Sequence[tuple[str, Row]],
    ticks: Sequence[str],
    *,
    x_title: str,
    y_title: str,
    since: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
) -> bytes:
    """Draw one line for each of several names over common places.

    Parameters
    ----------
    series : sequence of (name, values)
        None is a gap.
    ticks : sequence of str
        Names of the places.
    x_title, y_title : str
    since : sequence of int, optional
        The place from which on a line is drawn in full: before it, thin and with open marks.
    limits : (float, float), optional
        Of the y axis.
    """
    columns = 3 if max((len(name) for name, _ in series), default=0) <= 18 else 2
    below = 0.2 * math.ceil(len(series) / columns)
    turned = _crowded(ticks, 60)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        for i, (name, values) in enumerate(series):
            places = [place for place, value in enumerate(values) if value is not None]
            start = since[i] if since else 0
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)]}
            dash = DASHES[i // len(COLOURS) % len(DASHES)]
            before = [place for place in places if place < start]
            after = [place for place in places if place >= start]
            axes.plot(
                before + after[:1],
                [values[place] for place in before + after[:1]],
                linewidth=0.8,
                linestyle=":",
                markerfacecolor="white",
                markersize=4,
                **look,
            )
            axes.plot(
                after,
                [values[place] for place in after],
                linewidth=1.8,
                linestyle=dash,
                markersize=5,
                label=plain(name),
                **look,
            )
        axes.set_xticks(
            range(len(ticks)),
            [plain(name) for name in ticks],
            rotation=50 if turned else 0,
            ha="right" if turned else "center",
            rotation_mode="anchor",
        )
        axes.margins(x=0.04)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        if limits:
            axes.set_ylim(*limits)
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5)

    return picture(2.9 + below + (0.6 if turned else 0), paint)


def losses(series: Sequence[tuple[str, Row]], *, x_title: str, y_title: str) -> bytes:
    """Draw the loss of every step, one task after the other, each also smoothed."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        begin = 0
        for i, (name, found) in enumerate(series):
            values = [math.nan if value is None else value for value in found]
            colour = COLOURS[i % len(COLOURS)]
            steps = range(begin + 1, begin + len(values) + 1)
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.45)
            axes.plot(steps, smooth(values), color=colour, linewidth=1.8)
            if i:
                axes.axvline(begin + 0.5, color="#999999", linewidth=0.6)
            middle = begin + (len(values) + 1) / 2
            crowded = len(series) > 5
            axes.annotate(
                plain(name.split(" ")[0] if crowded else name),
                (middle, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=colour,
            )
            begin += len(values)
        known = [v for _, found in series for v in found if v is not None]
        if known and 0 < 5 * min(known) < max(known):
            axes.set_yscale("log")
            ticker = require("matplotlib.ticker", "the report")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlim(0.5, max(begin, 1) + 0.5)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)

    return picture(2.9, paint)


def smooth(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, a tenth of all on either side at most 10."""
    reach = min(10, len(values) // 10)
    found = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if not math.isnan(v)]
        found.append(sum(near) / len(near) if near else math.nan)
    return found


def bars(names: Sequence[str], panels: Sequence[tuple[str, Row, str]]) -> bytes:
    """Draw horizontal bars with their numbers: one panel for each (title, values, format)."""

    def paint(figure: Any) -> None:
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for i, (axes, (title, values, form)) in enumerate(zip(every, panels, strict=True)):
            widths = [value or 0.0 for value in values]
            drawn = axes.barh(range(len(names)), widths, color=COLOURS[i], height=0.65)
            texts = ["-" if value is None else format(value, form) for value in values]
            axes.bar_label(drawn, texts, padding=3, fontsize=8.5)
            axes.set_yticks(range(len(names)), [plain(name) for name in names])
            axes.set_xlabel(title)
            axes.set_xlim(0, 1.3 * max([*widths, 1e-9]))
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(i == 0)
        every[0].invert_yaxis()

    return picture(0.28 * len(names) + 0.75, paint)


def scatter(
    groups: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    *,
    front: Sequence[tuple[float, float]],
    x_title: str,
    y_title: str,
    beside: Sequence[tuple[str, tuple[float, float]]] = (),
) -> bytes:
    """Draw points (x, y, label), each group joined in its order; groups of one name look alike.

    Points of `beside` are small ones in the colour of the group of their name.

    Labels are put beside their points, away from those already there as far as that is simple.
    Through the points of `front`, from left to right, goes a line of steps.
    """
    names = list(dict.fromkeys(name for name, _ in groups))
    longest = max(map(len, names))
    columns = 4 if longest <= 16 else 2 if longest <= 40 else 1
    below = 0.22 * math.ceil(len(names) / columns)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid()
        axes.step(*zip(*front, strict=True), where="post", color="#aaaaaa", linewidth=4, zorder=1)
        placed: list[tuple[float, float]] = []
        points = [point for _, group in groups for point in group]
        wide = max(x for x, _, _ in points) - min(x for x, _, _ in points) or 1.0
        tall = max(y for _, y, _ in points) - min(y for _, y, _ in points) or 1.0
        for place, (name, group) in enumerate(groups):
            i = names.index(name)
            is_first = all(name != earlier for earlier, _ in groups[:place])
            axes.plot(
                [x for x, _, _ in group],
                [y for _, y, _ in group],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKS[i % len(MARKS)],
                markersize=7,
                linewidth=0.9,
                linestyle=DASHES[i % len(DASHES)],
                label=plain(shorten(name, 80 // columns)) if is_first else None,
            )
            for x, y, label in group:
                at = (x / wide, y / tall)
                near = sum(abs(at[0] - a) < 0.12 and abs(at[1] - b) < 0.05 for a, b in placed)
                if label:
                    placed.append(at)
                axes.annotate(
                    plain(label),
                    (x, y),
                    xytext=(6, 4 - 11 * near),
                    textcoords="offset points",
                    fontsize=7.5,
                )
        for name, (x, y) in beside:
            i = names.index(name)
            colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
            axes.plot(x, y, color=colour, marker=mark, markersize=3, alpha=0.6, zorder=1.5)
        axes.margins(0.12)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5)

    return picture(3.7 + below, paint)
