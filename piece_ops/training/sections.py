"""What the report says of one run: numbers, figures, and beside each figure a table."""

from __future__ import annotations

from piece_ops.training import figures
from piece_ops.training.blocks import DEFINITIONS, Figure, Section, Table, numbered, rows_of, ticks
from piece_ops.training.figures import shorten
from piece_ops.training.reading import Run
from piece_ops.training.report import nats, percent, perplexity_text, points
from piece_ops.training.results import Results, TaskRecord
from piece_ops.training.transfer import curves, difference, mean
from piece_ops.training.where import overlap_section, where_section


def run_sections(run: Run) -> list[Section]:
    """Return all that is known of a run; sections without content are left out."""
    results = run.results
    sections = [_numbers(run)]
    if results.accuracy:
        sections += [_scores(results), _stream(results)]
    if any(task.losses for task in results.tasks):
        sections.append(_training(results))
    if results.general and results.texts:
        sections.append(_general(results))
    if results.benchmarks and results.benchmarks[0]:
        sections.append(_benchmarks(results))
    if run.selections:
        sections.append(where_section(run))
    if len(run.selections) > 1:
        sections.append(overlap_section(run))
    return [*sections, _cost(results), _settings(run)]


def gain(results: Results) -> float | None:
    """Return the mean over the tasks of their score after their own training less the base's."""
    reached = max(0, len(results.accuracy) - 1)
    pairs = [(results.accuracy[i + 1][i], results.accuracy[0][i]) for i in range(reached)]
    return mean([difference(learned, before) for learned, before in pairs])


def _tasks(results: Results) -> list[tuple[str, TaskRecord]]:
    """Return the tasks with their numbered names."""
    names = numbered(task.name for task in results.tasks)
    return list(zip(names, results.tasks, strict=True))


def _stages(results: Results) -> list[str]:
    """Name the rows of the matrices."""
    return ["base", *numbered(task.name for task in results.tasks)][: len(results.accuracy)]


def _numbers(run: Run) -> Section:
    results, summary = run.results, run.results.summary()
    found = {
        "learned, %": percent(summary["accuracy_learned"]),
        "OP, %": percent(summary["accuracy_final"]),
        "BWT": points(summary["accuracy_backward_transfer"]),
        "FWT": points(summary["accuracy_forward_transfer"]),
        "forgetting": points(summary["accuracy_forgetting"]),
        "d": nats(summary["log_perplexity_drift"], sign=True),
    }
    facts = [(name, value, DEFINITIONS[name.split(",")[0]]) for name, value in found.items()]
    for j, text in enumerate(results.texts):
        if results.general:
            before, after = (
                perplexity_text(row[j]) for row in (results.general[0], results.general[-1])
            )
            what = f"perplexity of the general text, {text.tokens:,} tokens: base, now"
            facts.append((text.name, f"{before} → {after}", what))
    rows = []
    for name, task in _tasks(results):
        trained = "-" if task.trained is None else f"{task.trained:,}"
        counts = [f"{n:,}" for n in (task.train_rows, task.held_out_rows, task.truncated_rows)]
        rows.append([name, task.metric, *counts, task.held_out_split, trained])
    header = ["task", "metric", "training rows", "held-out rows", "cut off", "split", "trained"]
    table = Table("The tasks, in the order of learning", header, rows)
    return Section("In numbers", "", [], [table], facts)


def _scores(results: Results) -> Section:
    names, stages = numbered(t.name for t in results.tasks), _stages(results)
    texts = [[percent(v) for v in row] for row in results.accuracy]
    whole = [["" if v is None else f"{100 * v:.0f}" for v in row] for row in results.accuracy]
    png = figures.heat_map(
        [[None if v is None else 100 * v for v in row] for row in results.accuracy],
        [shorten(name) for name in stages],
        ticks(names),
        scale="score, %",
        row_title="after",
        texts=whole,
        limits=(0, 100),
    )
    worst = _most_forgotten(results)
    alt = (
        f"Heat map of scores: {len(stages)} rows, the base model and after each task; {len(names)} "
        f"columns, the tasks. {worst} All numbers are in the table beside it."
    )
    caption = "Row: after which task; column: on which task. Grey: not measured."
    tables = [
        Table("R: score in % (row: after, column: on)", ["after", *names], rows_of(stages, texts)),
        Table(
            "Mean loss of the answers, nats a token",
            ["after", *names],
            rows_of(stages, [[nats(v) for v in row] for row in results.loss]),
        ),
    ]
    figure = Figure("scores", alt, caption, png)
    return Section("What was learned and what was kept", "", [figure], tables)


def _most_forgotten(results: Results) -> str:
    """Say which task lost most since its own training."""
    last = results.accuracy[-1]
    falls = [
        (difference(results.accuracy[i + 1][i], last[i]), results.tasks[i].name)
        for i in range(len(results.accuracy) - 2)
    ]
    known = [(fall, name) for fall, name in falls if fall is not None and fall > 0]
    if not known:
        return ""
    fall, name = max(known)
    return f"{name} fell most since it was learned: {points(-fall)} points."


def _stream(results: Results) -> Section:
    names, stages = numbered(t.name for t in results.tasks), _stages(results)
    columns = [[row[j] for row in results.accuracy] for j in range(len(names))]
    png = figures.lines(
        [
            (shorten(name, 20), [None if v is None else 100 * v for v in column])
            for name, column in zip(names, columns, strict=True)
        ],
        ticks(stages),
        x_title="after",
        y_title="score, %",
        since=range(1, len(names) + 1),
        limits=(-3, 103),
    )
    alt = (
        "Line chart: the score of every task over the stream, one line a task. The numbers are "
        "those of R."
    )
    caption = "Full line and filled marks: from the task's own training on; dotted: before it."
    found = [
        [percent(numbers["op"]), *(points(numbers[key]) for key in ("bwt", "fwt", "forgetting"))]
        for numbers in curves(results.accuracy)
    ]
    table = Table(
        "After every task (OP in %, the others in points)",
        ["after", "OP", "BWT", "FWT", "forgetting"],
        rows_of(stages[1:], found),
    )
    tables = [table] if found else []
    return Section("Learning and forgetting", "", [Figure("stream", alt, caption, png)], tables)


def _training(results: Results) -> Section:
    trained = [(name, task.losses) for name, task in _tasks(results) if task.losses]
    rows = []
    for name, losses in trained:
        few = max(1, len(losses) // 10)
        first, last = (mean(list(part)) for part in (losses[:few], losses[-few:]))
        rows.append([name, f"{len(losses):,}", nats(first), nats(last)])
    png = figures.losses(
        [(shorten(name), losses) for name, losses in trained],
        x_title="optimizer step of the run",
        y_title="training loss, nats a token",
    )
    alt = "Line chart: the training loss of every step, one task after the other; see the table."
    caption = "Thin: every step; thick: smoothed. A vertical line: the next task begins."
    header = ["task", "steps", "loss at first", "at last"]
    table = Table("Mean training loss of the first and the last tenth of the steps", header, rows)
    return Section("Training", "", [Figure("training", alt, caption, png)], [table])


def _general(results: Results) -> Section:
    stages, base = _stages(results), results.general[0]
    drift = [[difference(row[j], base[j]) for row in results.general] for j in range(len(base))]
    names = [text.name for text in results.texts]
    png = figures.lines(
        [(shorten(name, 20), line) for name, line in zip(names, drift, strict=True)],
        ticks(stages),
        x_title="after",
        y_title="rise of log perplexity, nats",
    )
    alt = (
        "Line chart: how far the logarithm of the perplexity of each general text has risen over "
        "the base model's, after every task; see the table."
    )
    caption = "0: as the base model; higher: worse. 0.1 is a perplexity 10.5 % higher."
    cells = [[perplexity_text(value) for value in row] for row in results.general]
    for line, row in zip(cells, zip(*drift, strict=True), strict=True):
        line += [nats(value, sign=True) for value in row]
    header = ["after", *names, *(f"d {name}" for name in names)]
    table = Table("Perplexity, and d, the rise of its logarithm", header, rows_of(stages, cells))
    return Section("General ability", "", [Figure("general", alt, caption, png)], [table])


def _benchmarks(results: Results) -> Section:
    names = list(results.benchmarks[0])
    cells = [
        ["-" if row.get(name) is None else f"{row[name]:.3f}" for name in names]
        for row in results.benchmarks
    ]
    table = Table("Scores", ["after", *names], rows_of(_stages(results), cells))
    return Section("General ability by lm_eval", "", [], [table])


def _cost(results: Results) -> Section:
    meters = [("base", results.base_seconds, results.base_memory)]
    meters += [(name, task.seconds, task.memory) for name, task in _tasks(results) if task.seconds]
    phases = list(dict.fromkeys(p for _, seconds, _ in meters for p, n in seconds.items() if n))
    if not phases:
        return Section("Time and memory", "Nothing has been measured yet.")
    total = [sum(s.get(p, 0.0) for _, s, _ in meters) for p in phases]
    most = [max((m[p] for _, _, m in meters if p in m), default=None) for p in phases]
    form = ",.0f" if sum(total) >= 100 else ".2f"
    panels: list[tuple[str, figures.Row, str]] = [("seconds", total, form)]
    if any(most):
        memory: list[float | None] = [None if n is None else n / 1e9 for n in most]
        panels.append(("most memory, GB", memory, ".2f"))
    png = figures.bars(phases, panels)
    alt = "Bar chart: the time of every phase of the run, and its most memory; see the tables."
    header = ["of", *phases]
    times = [[n, *(f"{s[p]:,.1f}" if p in s else "-" for p in phases)] for n, s, _ in meters]
    times.append(["all", *(f"{value:,.1f}" for value in total)])
    tables = [Table("Seconds", header, times)]
    if any(most):
        gigabytes = [
            [n, *(f"{m[p] / 1e9:.2f}" if p in m else "-" for p in phases)] for n, _, m in meters
        ]
        tables.append(Table("Most resident memory in GB", header, gigabytes))
    if any(f"{p} (GPU)" in m for _, _, m in meters for p in phases):
        on_gpu = [
            [n, *(f"{m[f'{p} (GPU)'] / 1e9:.2f}" if f"{p} (GPU)" in m else "-" for p in phases)]
            for n, _, m in meters
        ]
        tables.append(Table("Most GPU memory allocated by torch in GB", header, on_gpu))
    text = f"{sum(total):,.0f} seconds in all"
    text += (
        f"; at most {results.peak_rss_bytes / 1e9:.2f} GB of memory."
        if results.peak_rss_bytes
        else "; how much memory was taken is not known."
    )
    caption = "Memory: of the whole process, so with what earlier phases left."
    figure = Figure("cost", alt, caption if any(most) else "", png)
    return Section("Time and memory", text, [figure], tables)


def _settings(run: Run) -> Section:
    results = run.results
    given = {"model": results.model, "parameters": f"{results.parameters:,}"}
    given |= {name: _text(value) for name, value in results.settings.as_dict().items()}
    made = {name: _text(value) for name, value in run.environment.items()}
    files = [[name, task.path] for name, task in _tasks(results)]
    files += [[text.name, text.path] for text in results.texts]
    tables = [
        Table("Settings", ["setting", "value"], [list(item) for item in given.items()]),
        Table("Environment", ["what", "value"], [list(item) for item in made.items()]),
        Table("Files", ["task or text", "read from"], files),
    ]
    return Section("Settings and environment", "", [], tables)


def _text(value: object) -> str:
    """Write a setting's value."""
    if value is None or value in ([], ""):
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
