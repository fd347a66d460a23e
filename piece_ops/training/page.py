"""The report as a file: one HTML page that needs nothing else, and its figures as PNG beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from piece_ops._files import write_bytes, write_text
from piece_ops.training.blocks import Figure, Section
from piece_ops.training.compared import compare, definitions
from piece_ops.training.extra import require
from piece_ops.training.output import OutputError
from piece_ops.training.reading import Run, read_run
from piece_ops.training.report import describe_run
from piece_ops.training.sections import run_sections
from piece_ops.training.variants import labels

REPORT = "report.html"
"""The report of a run, in its folder."""


def write_report(folders: Sequence[Path], out: Path, *, summary: bool = False) -> list[Path]:
    """Write the report of one run, or of several compared.

    Parameters
    ----------
    folders : sequence of Path
        Folders of runs, complete or not.
    out : Path
        The page, a name that ends in ``.html``. Its figures are also written as PNG, into a folder
        of the same name with ``-figures`` in place of ``.html``. Files that are there are replaced.
    summary : bool
        Only compare the runs, and say nothing of each: a small page, whatever their number.

    Returns
    -------
    list of Path
        What was written, the page first.

    Raises
    ------
    ResultsError, ValueError
        If a folder holds no run, or one of another release, or a damaged selection.
    OutputError
        If `out` cannot be such a file.

    Notes
    -----
    The same runs give the same bytes with the same matplotlib. Takes about a second a run, and
    for every selection its own size in memory.

    Examples
    --------
    >>> write_report([Path("run")], Path("run/report.html"))  # doctest: +SKIP
    """
    if len(folders) < (2 if summary else 1):
        least = "two runs for a summary" if summary else "one run"
        raise ValueError(
            f"piece_ops.write_report: wanted at least {least}, got {len(folders) or 'none'}"
        )
    if out.suffix != ".html" or out.is_dir():
        raise OutputError(f"{out}: wanted the name of a file that ends in .html")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.absolute().parent}")
    runs = [read_run(folder) for folder in folders]
    parts = [] if summary else [(run, run_sections(run)) for run in runs]
    above = []
    if len(runs) > 1:
        above = [compare(runs), definitions()]
        parts = [(run, _prefixed(f"{i}-", own)) for i, (run, own) in enumerate(parts, start=1)]
    write_text(out, _render(runs, above, [sections for _, sections in parts]))
    folder = out.with_name(f"{out.stem}-figures")
    folder.mkdir(exist_ok=True)
    written = [out]
    for section in [*above, *(section for _, own in parts for section in own)]:
        for figure in section.figures:
            written.append(folder / f"{figure.name}.png")
            write_bytes(written[-1], figure.png)
    return written


def keep_report(folder: Path, say: Callable[[str], None]) -> None:
    """Write the report of a run at work into its folder; when that fails, only say so."""
    try:
        write_report([folder], folder / REPORT)
    except Exception as error:  # whatever it is, a picture must not end a run of days
        say(f"note: the report could not be written: {type(error).__name__}: {error}")


def _prefixed(prefix: str, sections: Sequence[Section]) -> list[Section]:
    """Tell the figures of several runs apart."""
    return [
        replace(own, figures=[replace(f, name=prefix + f.name) for f in own.figures])
        for own in sections
    ]


def _render(
    runs: Sequence[Run], above: Sequence[Section], sections: Sequence[Sequence[Section]]
) -> str:
    """Fill the template."""
    jinja2 = require("jinja2", "the report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("piece_ops.training"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    names = labels(runs)
    parts = [
        {"label": label, "lead": _lead(run), "sections": own}
        for label, run, own in zip(names, runs, sections, strict=bool(sections))
    ]
    title = f"{len(runs)} runs compared" if above else f"Run {runs[0].name}"
    text: str = environment.get_template("report.html").render(
        title=title, above=above, parts=parts
    )
    return text


def _lead(run: Run) -> str:
    """Say in a sentence or two what was trained, and whether that is all."""
    results = run.results
    lead = f"{results.model}: {describe_run(results)}."
    if not results.complete:
        lead += f" The run is not complete: {run.reached} of {len(results.tasks)} tasks so far."
    return lead


def _data_uri(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.png).decode("ascii")
