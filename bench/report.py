"""``python -m bench.report FILE.jsonl ...``: tables for docs/benchmarks.md and README.md.

docs/benchmarks.md is written whole; in README.md only what stands between the lines
``<!-- bench:begin -->`` and ``<!-- bench:end -->``. Every number comes from the files given. Of a
case measured more than once the last file's rows count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.__main__ import size

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Line = dict[str, Any]
CaseKey = tuple[str, str]


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
        text = (
            f"{r['cpu']}, {r['cores']} cores, {r['memory_gib']} GiB, {r['threads']} threads, "
            f"instruction set {r['isa']}; piece_ops {r['piece_ops']} ({r['git'] or 'no commit'}), "
            f"torch {r['torch']}, numpy {r['numpy']}, Python {r['python']}; {r['date'][:10]}; "
            f"`GLIBC_TUNABLES={r['glibc_tunables']}` for every peer"
        )
        if r["quick"]:
            text += "; QUICK RUN: sizes too small to mean anything"
        if text not in seen:
            seen.append(text)
    return "\n".join(f"Measured on {text}." for text in seen)


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


def targets_table(cases: dict[CaseKey, list[Line]]) -> str:
    rows = [row for key, lines in cases.items() for row in target_rows(key, lines)]
    head = ["| op: case | what | target | measured | |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def figures_table(lines: list[Line]) -> str:
    """Rows that went through several phases: a column for each phase and each kind of bytes."""
    phases = {"importance_ms": "importance", "select_ms": "selection", "set_up_ms": "set-up"}
    kinds = {
        "state_bytes": "optimizer + gradients + masks",
        "file_bytes": "checkpoint",
        "ddp_bytes": "DDP, a step",
    }
    columns = [*phases.values(), "a step, median", "p20 to p80", "steps", "saving", *kinds.values()]
    head = f"| | {' | '.join(columns)} | peak of the steps |"
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
            "Times in ms. Peak: how far resident memory rose over the steps, activations included.",
            "",
            *rows,
        ]
    )


def case_table(lines: list[Line]) -> str:
    if any("figures" in line for line in lines):
        return figures_table(lines)
    head = [
        "| | ms, median | p20 to p80 | GB/s | % of bandwidth | best peer / this "
        "| extra memory | calls |",
        "|---|---|---|---|---|---|---|---|",
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
            rows.append(f"| {name} | {line['status']} | | | | | | |")
            continue
        ratio = line["best_peer_over_this"]
        extra, percent = line["extra_bytes"], line["percent_of_bandwidth"]
        rows.append(
            f"| {name} | {milliseconds(line['p50_ms'])} "
            f"| {milliseconds(line['p20_ms'])} to {milliseconds(line['p80_ms'])} "
            f"| {line['gb_per_s']:.3g} | {'' if percent is None else f'{percent:.0f}'} "
            f"| {'' if ratio is None else f'{ratio:.3g}'} "
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
    ]
    op = ""
    for key, lines in cases.items():
        if key[0] != op:
            op = key[0]
            parts.append(f"## {op}")
        parts += [f"### {key[1]} ({lines[0]['dtype']})", case_table(lines)]
        if own := target_rows(key, lines):
            parts.append(
                "\n".join(["| | what | target | measured | |", "|---|---|---|---|---|", *own])
            )
    return "\n\n".join(parts) + "\n"


def section(cases: dict[CaseKey, list[Line]]) -> str:
    """What stands between the markers of README.md."""
    return "\n\n".join([targets_table(cases), where(cases)])


def put_between_markers(text: str, section_text: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(
            f"README.md must hold the lines {BEGIN} and {END} once each, in this order"
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
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(argv)
    cases = load(args.files)
    readme = put_between_markers(args.readme.read_text(encoding="utf-8"), section(cases))
    write(args.page, page(cases))
    write(args.readme, readme)
    print(f"written: {args.page}, {args.readme}")


if __name__ == "__main__":
    main(sys.argv[1:])
