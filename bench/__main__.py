"""``python -m bench``: run the benchmarks, print each case with its targets, write JSON lines."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.machine import GLIBC_TUNABLES

OPS = {
    "select_topk": "bench_select_topk",
    "accumulate_squares_": "bench_accumulate_squares",
    "accumulate_per_sample_squares_": "bench_accumulate_per_sample_squares",
    "sparse_adamw_": "bench_sparse_adamw",
    "gather": "bench_gather",
    "scatter_": "bench_scatter",
    "total": "bench_total",
    "sampled_weight_grad": "bench_sampled_weight_grad",
    "importance": "bench_importance",
    "training_step": "bench_training_step",
    "pipeline": "bench_pipeline",
    "delta": "bench_delta",
    "call_overhead": "bench_call_overhead",
    "scaling": "bench_scaling",
}

# Seconds of each op's cases, to end in a quarter of an hour together: on two idle cores of 2026
# with 24 GiB. A case that is to take longer must be paid for by another one.
PLANNED = {
    "select_topk": 155,
    "accumulate_squares_": 13,
    "accumulate_per_sample_squares_": 16,
    "sparse_adamw_": 14,
    "gather": 3,
    "scatter_": 3,
    "total": 4,
    "sampled_weight_grad": 27,
    "importance": 135,
    "training_step": 130,
    "pipeline": 190,
    "delta": 20,
    "call_overhead": 2,
    "scaling": 85,
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)} (all)")
    parser.add_argument("--quick", action="store_true", help="small inputs, only to see it run")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--dry", action="store_true", help="list cases and planned seconds only")
    parser.add_argument("--out", type=Path, help="JSON lines are written here, when all have run")
    parser.add_argument(
        "--update", action="store_true", help="keep the rows of --out's other cases"
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--plain-malloc", action="store_true", help="keep the allocator's settings as they are"
    )
    args = parser.parse_args(argv)
    known = {name.rstrip("_"): name for name in OPS}
    for op in args.ops:
        if op.rstrip("_") not in known:
            parser.error(f"OP must be one of {', '.join(OPS)}, got {op}")
    if args.update and not args.out:
        parser.error("--update needs --out FILE, got none")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    args.ops = [known[op.rstrip("_")] for op in args.ops] or list(OPS)
    return args


def size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")


Predict = Callable[[dict[str, Any], "float | None"], "float | None"]
"""Gets a row's line and its floor's GB/s; the milliseconds that the cost model predicts, if any."""


def records(name: str, case: Any, rows: list[Any], predict: Predict) -> Iterator[dict[str, Any]]:
    """The JSON lines of a case: one per peer, one per target."""
    from bench import harness

    head = {"op": case.op, "case": name, "dtype": case.dtype, "n": case.n}
    head.update(k=case.k, tensors=case.tensors)
    for row in rows:
        beside = [other for other in rows if other.at.get("x") == row.at.get("x")]
        bandwidth = harness.best_bandwidth(beside)
        best = harness.fastest(beside, "peer")
        line: dict[str, Any] = {"kind": "row", **head, "peer": row.peer, "role": row.role}
        line.update(row.at, status=row.status, note=row.note)
        if row.times_ms:
            line.update(
                repeats=len(row.times_ms),
                p20_ms=round(row.percentile_ms(0.2), 4),
                p50_ms=round(row.p50_ms, 4),
                p80_ms=round(row.percentile_ms(0.8), 4),
                bytes=row.n_bytes,
                gb_per_s=round(row.gb_per_s, 3),
                percent_of_bandwidth=round(100 * row.gb_per_s / bandwidth, 1)
                if bandwidth
                else None,
                best_peer_over_this=round(best.p50_ms / row.p50_ms, 3) if best else None,
            )
            if (ms := predict(line, bandwidth)) is not None:
                line["predicted_ms"] = round(ms, 4)
        line["extra_bytes"] = row.extra_bytes
        if row.figures:
            line["figures"] = {key: round(value, 6) for key, value in row.figures.items()}
        yield line
    by_name = {row.peer: row for row in rows}
    for target in case.targets:
        got = target.measure(by_name)
        verdict = "not measured"
        if got is not None:
            is_met = got <= target.limit if target.at_most else got >= target.limit
            verdict = "met" if is_met else "short"
        yield {
            "kind": "target",
            **head,
            "target": target.text,
            "limit": target.limit,
            "at_most": target.at_most,
            "unit": target.unit,
            "measured": None if got is None else round(got, 3),
            "verdict": verdict,
        }


def show(lines: list[dict[str, Any]]) -> None:
    first = lines[0]
    seconds = sum(line["seconds"] for line in lines if line["kind"] == "case")
    print(f"\n{first['op']}: {first['case']} ({first['dtype'] or 'nothing'}), {seconds:.1f} s")
    print(
        f"  {'':<38}{'ms':>10} {'p20':>9} {'p80':>9} {'GB/s':>7} {'% bw':>6} {'peer/x':>8} "
        f"{'model':>8}  extra"
    )
    for line in lines:
        if line["kind"] == "row" and "p50_ms" in line:
            ratio = line["best_peer_over_this"]
            extra, percent = line["extra_bytes"], line["percent_of_bandwidth"]
            model = line.get("predicted_ms")
            print(
                f"  {line['peer']:<38}{line['p50_ms']:>10.2f} {line['p20_ms']:>9.2f} "
                f"{line['p80_ms']:>9.2f} {line['gb_per_s']:>7.2f} "
                f"{'' if percent is None else f'{percent:.1f}':>6} "
                f"{'' if ratio is None else f'{ratio:.2f}':>8} "
                f"{'' if model is None else f'{model:.2f}':>8}  "
                f"{'?' if extra is None else size(extra)}  ({line['repeats']} calls)"
            )
        elif line["kind"] == "row":
            print(f"  {line['peer']:<38}{line['status']}")
        if "figures" in line:
            print("    " + ", ".join(f"{key} {x:,.6g}" for key, x in line["figures"].items()))
    for line in lines:
        if line["kind"] == "target":
            sign = "<=" if line["at_most"] else ">="
            print(
                f"  -> {line['target']}: {line['measured']} {line['unit']} "
                f"(target {sign} {line['limit']:g}): {line['verdict']}"
            )
    sys.stdout.flush()


def list_cases(args: argparse.Namespace) -> None:
    for op in args.ops:
        names = [name for name, _ in module_of(op).cases(args.quick) if args.only in name]
        print(f"{op}: {len(names)} cases, {PLANNED[op]} s planned for all of the op")
        print("".join(f"  {name}\n" for name in names), end="")
    print(f"{sum(PLANNED[op] for op in args.ops)} s planned")


def module_of(op: str) -> Any:
    return importlib.import_module(f"bench.{OPS[op]}")


def run(args: argparse.Namespace) -> int:
    """All cases asked for; 1 if an answer of ours was wrong."""
    import torch

    from bench import machine

    torch.set_num_threads(args.threads)
    common = {"quick": args.quick, **machine.describe()}
    print(" | ".join(f"{key} {value}" for key, value in common.items()))
    started, out = time.monotonic(), []
    for op in args.ops:
        for name, build in module_of(op).cases(args.quick):
            if args.only in name:
                lines = run_one(op, name, build, common)
                show(lines)
                out += [{**line, **common} for line in lines]
                if args.out:
                    write(part_of(args.out), out)
    ours = [line for line in out if line["kind"] == "row" and line["role"] == "ours"]
    wrong, absent = (
        sum(line["status"].startswith(word) for line in ours) for word in ("wrong", "absent")
    )
    print(f"\n{time.monotonic() - started:.0f} s; of ours {wrong} wrong, {absent} absent")
    if args.out:
        if args.update and args.out.exists():
            write(part_of(args.out), [*others(args.out, out), *out])
        part_of(args.out).replace(args.out)
        print(f"written: {args.out}")
    return 1 if wrong else 0


def run_one(op: str, name: str, build: Any, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON lines of one case, its inputs made and gone again; the last one says how long."""
    from bench import harness, predicted

    def predict(line: dict[str, Any], gb_per_s: float | None) -> float | None:
        return predicted.milliseconds(line, gb_per_s, common["gflop_per_s"])

    started = time.monotonic()
    harness.hand_back()
    try:
        case = build()
    except (harness.Absent, ImportError, MemoryError) as error:
        case = harness.absent_case(op, error)
    rows = harness.run_case(case, common["quick"])
    lines = list(records(name, case, rows, predict))
    seconds = round(time.monotonic() - started, 2)
    head = {key: lines[0][key] for key in ("op", "case", "dtype", "n")}
    return [*lines, {"kind": "case", **head, "seconds": seconds}]


def others(path: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a file that belong to other cases."""
    done = {(line["op"], line["case"]) for line in lines}
    kept = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line for line in kept if (line["op"], line["case"]) not in done]


def part_of(path: Path) -> Path:
    """Where the lines lie until all are there: an interrupted run leaves the old ones alone."""
    return path.with_name(path.name + ".part")


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    args = parse(sys.argv[1:])
    if args.dry:
        list_cases(args)
        return
    if not args.plain_malloc and os.environ.get("GLIBC_TUNABLES") != GLIBC_TUNABLES:
        # glibc reads its tunables at process start only.
        environment = {**os.environ, "GLIBC_TUNABLES": GLIBC_TUNABLES}
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], environment)
    sys.exit(run(args))


if __name__ == "__main__":
    main()
