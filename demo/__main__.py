"""``python -m demo``: prepare the model, build the tasks, learn them, print what came out.

``make demo`` calls this from the root of the source tree, in the project's virtual environment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

from demo.compare import (
    RECORDED,
    Comparison,
    comparison_table,
    data_digest,
    read_recorded,
    summarise,
    write_recorded,
)
from demo.model import DemoError, prepare_model
from demo.settings import SHOWN, STUDY, TASKS, TEXTS
from demo.tasks import write_data

# Dense gradients come and go tensor by tensor; by default glibc hands such blocks back to the
# system each time and takes them anew, page by page. Huge pages and a high threshold keep them:
# 2.6 million page faults became 0.06 million in a run of 40 steps. glibc reads this once, when a
# process starts, so the demo starts itself again with it. Only speed depends on it.
TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=4000000000",
        "glibc.malloc.trim_threshold=16000000000",
    )
)


def restart_with_tunables() -> None:
    """Start this process again with `TUNABLES`, unless they are set or there is no glibc."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        environment = {**os.environ, "GLIBC_TUNABLES": TUNABLES}
        os.execve(sys.executable, [sys.executable, "-m", "demo", *sys.argv[1:]], environment)


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--compare", action="store_true", help="run the whole comparison anew")
    parser.add_argument(
        "--record", action="store_true", help="with --compare: keep it as the recorded one"
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder for everything")
    arguments = parser.parse_args()
    restart_with_tunables()
    try:
        return _demo(arguments)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 2


def _demo(arguments: argparse.Namespace) -> int:
    """Run the demo's phases."""
    started = time.perf_counter()
    print("model: SmolLM2-135M-Instruct (first time: 93 MB download, half a minute to convert)")
    model = prepare_model(arguments.cache)
    data = arguments.cache / "demo-data"
    write_data(data)
    print(f"tasks: built from Python's own data into {data}")
    prepared = time.perf_counter()
    if arguments.compare:
        return _compare(arguments, model, data)

    from piece_ops.cli import main as piece_ops

    out = arguments.cache / "demo-run"
    command = STUDY.run_command(model, data, out, SHOWN)
    print(f"\npiece-ops {' '.join(command)}\n", flush=True)
    status = piece_ops(command)
    if status != 0:
        return status
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    _print_comparison(summarise(results, SHOWN.held_out, SHOWN.variant.name), data)
    print(
        f"\n{prepared - started:.0f} s to prepare, {time.perf_counter() - prepared:.0f} s to run; "
        f"the trained model is in {out / 'model'}"
    )
    return 0


def _print_comparison(run: dict[str, object], data: Path) -> None:
    """Print this run beside the recorded ones."""
    rows = [(f"{SHOWN.variant.name} (this run)", run)]
    recorded = read_recorded()
    if recorded is not None:
        rows += [(line["method"], line) for line in recorded["chosen"]]
    print("\nat the end of the three tasks, right answers in %, test rows")
    print(comparison_table(rows, TASKS, TEXTS))
    print(
        "change: of the earlier tasks since each was learned; d: change of the logarithm of the "
        "perplexity"
    )
    if recorded is None:
        print("there is no recorded comparison in this tree; make demo COMPARE=1 runs it")
        return
    print(
        f"the rows below the first were recorded on {recorded['date']} "
        f"({recorded['machine']['cpus']} CPUs, {recorded['machine']['instruction_set']}), each "
        "method at the best of its learning rates, chosen on eval rows; make demo COMPARE=1 runs "
        "them again"
    )
    if recorded["data_sha256"] != data_digest(data, TASKS):
        print("note: the tasks differ from the recorded ones (another tzdata)")


def _compare(arguments: argparse.Namespace, model: Path, data: Path) -> int:
    """Run the comparison and print it."""
    comparison = Comparison(STUDY, model, data, arguments.cache / "compare").run()
    path = RECORDED if arguments.record else arguments.cache / "compare" / "comparison.json"
    write_recorded(comparison, path)
    print("\nthe grid, measured on eval rows")
    print(comparison_table([(run["method"], run) for run in comparison["grid"]], TASKS, TEXTS))
    print("\neach method at its best rate, measured on test rows")
    print(comparison_table([(run["method"], run) for run in comparison["chosen"]], TASKS, TEXTS))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
