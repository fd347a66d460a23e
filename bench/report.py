"""``python -m bench.report FILE.jsonl ...``: README.md, docs/benchmarks.md, scale.md and plots.

docs/benchmarks.md and docs/plots are written whole; in the two others only what stands between the
lines ``<!-- bench:begin -->`` and ``<!-- bench:end -->``. Every number comes from the files given.
Of a case measured more than once the last file's rows count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench import plots, predicted
from bench.__main__ import OPS, PLANNED, module_of, size

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Line = dict[str, Any]
CaseKey = tuple[str, str]
# What the README shows: beginnings of case names; none: the first case of the op.
MAIN = {
    "select_topk": (
        "Gaussian squared, n = 1e+08",
        "Gaussian squared, n = 5e+08",
        "Gaussian squared, n = 1e+09",
        "PIECE-S",
    ),
    "accumulate_squares_": (),
    "sparse_adamw_": (),
    "pipeline": (),
    "importance": (),
    "training_step": (),
    "delta": (),
    "call_overhead": ("10 of 10,000 numbers, 1 thread",),
    "scaling": ("select_topk against elements",),
    "select_topk, CUDA": ("Gaussian squared, n = 1e+09 float32, k = 0.1 %", "fused"),
    "accumulate_squares_, CUDA": (),
    "sparse_adamw_, CUDA": (),
    "training_step, CUDA": (),
    "importance, CUDA": (),
}


def load(paths: list[Path]) -> dict[CaseKey, list[Line]]:
    """The lines of each case (op, name), in order of first appearance."""
    cases: dict[CaseKey, list[Line]] = {}
    for path in paths:
        of_file: dict[CaseKey, list[Line]] = {}
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                of_file.setdefault((line["op"], line["case"]), []).append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path}:{number}: wanted a benchmark row, got {error}") from None
        cases.update(of_file)
    if not cases:
        raise SystemExit("bench.report: wanted at least one row, got none")
    return cases


def where(cases: dict[CaseKey, list[Line]]) -> str:
    """One sentence per distinct machine and setting."""
    seen = []
    for lines in cases.values():
        r = lines[0]
        gpu = f"{r['gpu']}, beside " if r.get("gpu") else ""
        text = (
            f"{gpu}{r['cpu']}, {r['cores']} cores, {r['memory_gib']} GiB, {r['threads']} threads, "
            f"instruction set {r['isa']}; piece_ops {r['piece_ops']} ({r['git'] or 'no commit'}), "
            f"torch {r['torch']}, numpy {r['numpy']}, "
            + "".join(f"{k} {r[k]}, " for k in ("transformers", "peft", "jax") if r.get(k))
            + f"Python {r['python']}; {r['date'][:10]}"
        )
        if r["quick"]:
            text += "; QUICK RUN: sizes too small to mean anything"
        if text not in seen:
            seen.append(text)
    tunables = {lines[0]["glibc_tunables"] for lines in cases.values()} - {""}
    said = "".join(f" `GLIBC_TUNABLES={text}` for every peer." for text in sorted(tunables))
    return "\n".join(f"Measured on {text}." for text in seen) + said


def number(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {unit}"


def target_rows(key: CaseKey, lines: list[Line]) -> list[str]:
    out = []
    for line in lines:
        if line["kind"] != "target":
            continue
        sign = "≤" if line["at_most"] else "≥"
        limit = number(line["limit"], line["unit"])
        got = number(line["measured"], line["unit"])
        verdict = line["verdict"] if line["verdict"] == "met" else f"**{line['verdict']}**"
        out.append(
            f"| {key[0]}: {key[1]} | {line['target']} | {sign} {limit} | {got} | {verdict} |"
        )
    return out


def targets_table(cases: dict[CaseKey, list[Line]], all_of_them: bool = True) -> str:
    """A row a target; of the README only the main cases'."""
    rows, seen = [], set()
    for key, lines in cases.items():
        is_main = key[1].startswith(names) if (names := MAIN.get(key[0])) else names == ()
        is_main &= bool(names) or key[0] not in seen
        seen.add(key[0])
        made = target_rows(key, lines)
        rows += made if all_of_them or is_main else []
    head = ["| op: case | what | target | measured | |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def missed(cases: dict[CaseKey, list[Line]]) -> str:
    """How many targets each op misses, of how many."""
    counts = {}
    for (op, _), lines in cases.items():
        verdicts = [line["verdict"] for line in lines if line["kind"] == "target"]
        short, of = counts.get(op, (0, 0))
        counts[op] = short + verdicts.count("short"), of + len(verdicts)
    short, of = (sum(column) for column in zip(*counts.values(), strict=True))
    each = ", ".join(f"{op} {short} of {of}" for op, (short, of) in counts.items() if short)
    return f"Of all {of} targets {short} are missed ({each}): **short** in docs/benchmarks.md."


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def figures_table(lines: list[Line]) -> str:
    """Rows that went through several phases: a column for each phase and each kind of bytes."""
    phases = {"importance_ms": "importance", "select_ms": "selection", "set_up_ms": "set-up"}
    kinds = {
        "state_bytes": "optimizer + gradients + masks",
        "file_bytes": "checkpoint",
        "ddp_bytes": "DDP, a step",
        "importance_extra_bytes": "importance, extra memory",
        "select_extra_bytes": "selection, extra memory",
        "set_up_extra_bytes": "set-up, extra memory",
    }
    columns = [*phases.values(), "a step, median", "p20 to p80", "steps", "saving", *kinds.values()]
    head = f"| | {' | '.join(columns)} | steps, extra memory |"
    rows = [head, "|---" * (len(columns) + 2) + "|"]
    for line in lines:
        if line["kind"] != "row":
            continue
        name = f"**{line['peer']}**" if line["role"] == "ours" else line["peer"]
        name += f" ({line['note']})" if line["note"] else ""
        if line["status"] != "ok":
            rows.append(f"| {name} | {line['status']}{' |' * (len(columns) + 1)}")
            continue
        figures, timed = line["figures"], "p50_ms" in line
        cells = [milliseconds(figures[key]) if key in figures else "" for key in phases]
        cells.append(milliseconds(line["p50_ms"]) if timed else "")
        cells.append(
            f"{milliseconds(line['p20_ms'])} to {milliseconds(line['p80_ms'])}" if timed else ""
        )
        cells.append(f"{figures['steps']:.0f}" if timed else "")
        cells.append(milliseconds(figures["checkpoint_ms"]) if timed else "")
        cells += [size(figures[key]) if key in figures else "" for key in kinds]
        cells.append("" if line["extra_bytes"] is None else size(line["extra_bytes"]))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "Times in ms. Extra memory: how far resident memory rose at most over the phase "
            "(steps: the first two, activations included).",
            "",
            *rows,
        ]
    )


def case_table(lines: list[Line]) -> str:
    if any("select_ms" in line.get("figures", {}) for line in lines):
        return figures_table(lines)
    head = [
        "| | ms, median | p20 to p80 | GB/s | % of bandwidth | best peer / this "
        "| cost model, ms | extra memory | calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for line in lines:
        if line["kind"] != "row":
            continue
        name = f"**{line['peer']}**" if line["role"] == "ours" else line["peer"]
        if line["role"] in ("floor", "bound"):
            name = f"*{line['peer']}*"
        if line["note"]:
            name += f" ({line['note']})"
        if "p50_ms" not in line:
            rows.append(f"| {name} | {line['status']} | | | | | | | |")
            continue
        ratio = line["best_peer_over_this"]
        extra, percent = line["extra_bytes"], line["percent_of_bandwidth"]
        rows.append(
            f"| {name} | {milliseconds(line['p50_ms'])} "
            f"| {milliseconds(line['p20_ms'])} to {milliseconds(line['p80_ms'])} "
            f"| {line['gb_per_s']:.3g} | {'' if percent is None else f'{percent:.0f}'} "
            f"| {'' if ratio is None else f'{ratio:.3g}'} "
            f"| {milliseconds(line['predicted_ms']) if 'predicted_ms' in line else ''} "
            f"| {'?' if extra is None else size(extra)} | {line['repeats']} |"
        )
    return "\n".join([*head, *rows])


def page(cases: dict[CaseKey, list[Line]]) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        "Made by `python -m bench.report` from the rows of `make bench`; not edited by hand. How "
        "each number is measured: `bench/harness.py`. Rows in italics are bounds: a plain read or "
        "copy of the same memory in the same run, or a part of the work that every way needs. "
        "*best peer / this* above 1: this is faster than every other way measured. Peers that take "
        "seconds are called fewer times.",
        where(cases),
        "## Targets",
        targets_table(cases),
        "## Time",
        time_table(cases),
    ]
    drawn = {key: (file, what) for key, file, what, _ in plots.plots(cases)}
    op = ""
    for key, lines in cases.items():
        if key[0] != op:
            op = key[0]
            parts.append(f"## {op}")
        parts.append(f"### {key[1]} ({', '.join(filter(None, [lines[0]['dtype'], took(lines)]))})")
        if key in drawn:
            parts.append(f"![{drawn[key][1]}](plots/{drawn[key][0]})")
        parts.append(case_table(lines))
        if own := target_rows(key, lines):
            parts.append(
                "\n".join(["| | what | target | measured | |", "|---|---|---|---|---|", *own])
            )
    return "\n\n".join(parts) + "\n"


def time_table(cases: dict[CaseKey, list[Line]]) -> str:
    """How long `make bench` takes, by op."""
    rows = ["| op | cases | seconds | planned |", "|---|---|---|---|"]
    total = 0.0
    for op, planned in PLANNED.items():
        of_op = [lines for key, lines in cases.items() if key[0] == op]
        seconds = sum(
            line["seconds"] for lines in of_op for line in lines if line["kind"] == "case"
        )
        total += seconds
        rows.append(f"| {op} | {len(of_op)} | {seconds:.0f} | {planned} |")
    rows.append(f"| all | | {total:.0f} | {sum(PLANNED.values())} |")
    said = (
        "Of the cases on the CPU, inputs and checks included; `python -m bench --dry` lists them."
    )
    return "\n".join([said, "", *rows])


def took(lines: list[Line]) -> str:
    seconds = [line["seconds"] for line in lines if line["kind"] == "case"]
    return f"{sum(seconds):.0f} s" if seconds else ""


def pipeline_table(lines: list[Line]) -> str:
    """Every way through the pipeline, in the README's few columns."""
    rows = [
        "| whole pipeline, 0.1 % of SmolLM2-135M | selection | a step "
        "| optimizer + gradients + masks | checkpoint | DDP, a step |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        if line["kind"] != "row":
            continue
        name = f"**{line['peer']}**" if line["role"] == "ours" else line["peer"]
        if line["status"] != "ok":
            rows.append(f"| {name} | {line['status']} | | | | |")
            continue
        figures = line["figures"]
        cells = [f"{milliseconds(figures['select_ms'])} ms" if "select_ms" in figures else ""]
        cells.append(f"{milliseconds(line['p50_ms'])} ms" if "p50_ms" in line else "")
        keys = ("state_bytes", "file_bytes", "ddp_bytes")
        cells += [size(figures[key]) if key in figures else "" for key in keys]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def section(cases: dict[CaseKey, list[Line]]) -> str:
    """What stands between the markers of README.md."""
    pipelines = [pipeline_table(lines) for key, lines in cases.items() if key[0] == "pipeline"]
    said = [targets_table(cases, False), missed(cases), where(cases), not_recorded(cases)]
    return "\n\n".join(filter(None, [*pipelines, *said]))


def not_recorded(cases: dict[CaseKey, list[Line]]) -> str:
    """How many cases of each op on the CPU have no rows; empty if all have."""
    counts = {
        op: sum((op, name) not in cases for name, _ in module_of(op).cases(False)) for op in OPS
    }
    named = ", ".join(f"{count} of {op}" for op, count in counts.items() if count)
    return f"Cases of `make bench` that are not recorded yet: {named}." if named else ""


def agreement(cases: dict[CaseKey, list[Line]]) -> str:
    """What stands between the markers of docs/scale.md: the cost model against the rows of ours."""
    ratios: dict[str, list[tuple[float, str]]] = {}
    for (op, case), lines in cases.items():
        for line, ratio in predicted.ratios(lines):
            if line["role"] == "ours":
                name = f"{line['kernel']}, sweeps" if "kernel" in line else op
                at = f"{case}: {line['peer']}" if "kernel" in line else case
                ratios.setdefault(name, []).append((ratio, at))
    for name, (guess, measured) in predicted.pipeline(cases).items():
        ratios[f"pipeline, {name}"] = [(guess / measured, "SmolLM2-135M")]
    rows = ["| op | rows | predicted / measured | least at | most at |", "|---|---|---|---|---|"]
    for name, found in ratios.items():
        (low, where_low), (high, where_high) = min(found), max(found)
        rows.append(
            f"| `{name}` | {len(found)} | {low:.2f} to {high:.2f} | {where_low} | {where_high} |"
        )
    return "\n".join(rows)


def put_between_markers(path: Path, section_text: str) -> str:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(
            f"{path.name} must hold the lines {BEGIN} and {END} once each, in this order"
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{section_text}\n{END}{after}"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines of python -m bench --out")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs")
    args = parser.parse_args(argv)
    for path, text in pages(load(args.files), args.root).items():
        write(path, text)
        print(f"written: {path}")
    print(f"written: {len(plots.draw(load(args.files), args.root / 'docs' / 'plots'))} plots")


def pages(cases: dict[CaseKey, list[Line]], root: Path) -> dict[Path, str]:
    """The text of every file that rows are written into."""
    readme, scale = root / "README.md", root / "docs" / "scale.md"
    return {
        root / "docs" / "benchmarks.md": page(cases),
        readme: put_between_markers(readme, section(cases)),
        scale: put_between_markers(scale, agreement(cases)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
