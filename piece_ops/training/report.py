"""The printed tables of a run: what was learned, forgotten, and lost in general ability."""

from __future__ import annotations

import math

from piece_ops._text import format_table as format_table
from piece_ops.training.results import Results
from piece_ops.training.transfer import difference


def percent(value: float | None) -> str:
    """Write a share as percent with one decimal, or ``-``."""
    return "-" if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """Write a difference of shares in percentage points with its sign, or ``-``."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"  # no -0.0


def nats(value: float | None, sign: bool = False) -> str:
    """Write a loss with three decimals, or ``-``."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.3f}"


def perplexity_text(loss: float | None) -> str:
    """Write the perplexity that belongs to a mean loss, or ``-``."""
    return "-" if loss is None else ("inf" if loss > 700 else f"{math.exp(loss):.2f}")


def describe_run(results: Results) -> str:
    """Say in one line what was trained how."""
    settings = results.settings
    trained = next((task.trained for task in results.tasks if task.trained is not None), None)
    if settings.method == "full":
        what = f"all {results.parameters:,} parameters"
    elif trained is None:
        what = "no task yet"
    elif settings.method == "lora":
        what = f"{trained:,} parameters of an adapter a task, beside {results.parameters:,}"
    else:
        what = f"{trained:,} of {results.parameters:,} parameters a task"
    return f"{settings.method}, {what}, learning rate {settings.lr:g}, seed {settings.seed}"


def format_results(results: Results) -> str:
    """Write the tables of a run.

    Parameters
    ----------
    results : Results
        Complete or not; what was not measured is shown as ``-``.

    Returns
    -------
    str
        Plain text of several lines.
    """
    reached = len(results.accuracy) - 1
    parts = [describe_run(results), "", "learned and forgotten (scores in %, held-out rows)"]
    rows = []
    for j, task in enumerate(results.tasks):
        before = results.accuracy[0][j]
        learned = results.accuracy[j + 1][j] if j < reached else None
        final = results.accuracy[reached][j] if j < reached else None
        rows.append(
            [
                task.name if task.metric == "exact" else f"{task.name} ({task.metric})",
                f"{task.held_out_rows}",
                percent(before),
                percent(learned),
                percent(final),
                points(difference(final, learned)),
                nats(results.loss[0][j]),
                nats(results.loss[j + 1][j] if j < reached else None),
                nats(results.loss[reached][j] if j < reached else None),
            ]
        )
    header = ["task", "rows", "before", "learned", "at the end", "change"]
    parts.append(format_table([*header, "loss before", "learned", "at the end"], rows))
    if results.texts:
        parts += ["", "cost in general ability (perplexity; d is the change of its logarithm)"]
        header = ["text", "tokens", "before"]
        header += [f"after {task.name}" for task in results.tasks[:reached]] + ["d"]
        rows = []
        for j, text in enumerate(results.texts):
            row = [text.name, f"{text.tokens}"]
            row += [perplexity_text(line[j]) for line in results.general]
            row.append(nats(difference(results.general[-1][j], results.general[0][j]), sign=True))
            rows.append(row)
        parts.append(format_table(header, rows))
    if results.benchmarks and results.benchmarks[0]:
        parts += ["", "general ability by lm_eval"]
        header = [
            "benchmark",
            "before",
            *(f"after {task.name}" for task in results.tasks[:reached]),
        ]
        rows = [
            [name, *(f"{scores[name]:.3f}" for scores in results.benchmarks)]
            for name in results.benchmarks[0]
        ]
        parts.append(format_table(header, rows))
    parts += ["", time_line(results)]
    return "\n".join(parts)


def time_line(results: Results) -> str:
    """Say where the time went and how much memory was taken at most."""
    sums: dict[str, float] = dict(results.base_seconds)
    for task in results.tasks:
        for phase, seconds in task.seconds.items():
            sums[phase] = sums.get(phase, 0.0) + seconds
    spent = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in sums.items())
    line = f"seconds: {spent}; {sum(sums.values()):.0f} in all"
    if results.peak_rss_bytes:
        line += f"; at most {results.peak_rss_bytes / 1e9:.1f} GB of memory"
    return line
