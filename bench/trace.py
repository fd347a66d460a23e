"""``python -m bench.trace --data DIR``: three tasks of TRACE in a row, all methods, two seeds.

DIR holds the folders FOMC, NumGLUE-cm and ScienceQA, each with ``train.jsonl``, ``eval.jsonl`` and
``test.jsonl`` (rows ``{"prompt": ..., "answer": ...}``) of the benchmark's 1000-sample edition,
which is not distributed here: its licences differ from task to task, some are non-commercial. Every
run is one ``piece-ops train`` on one thread, with ``--device cuda`` on the GPU; several run beside
each other. Interrupted, the same command goes on, on either device. All runs go to
``bench/results/trace.json``, the tables to ``docs/trace.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.machine import GLIBC_TUNABLES
from demo.compare import Comparison, Study, Variant, comparison_table, write_recorded
from demo.model import prepare_model
from demo.tasks import write_data
from piece_ops._files import write_text
from piece_ops.training.compared import front
from piece_ops.training.report import format_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "trace.json"
PAGE = ROOT / "docs" / "trace.md"
CACHE = Path(".cache")  # of the source tree, where this is run, like the demo

METRICS = {"FOMC": "letter", "NumGLUE-cm": "number", "ScienceQA": "letter"}
"""Tasks in the order of learning, each with its metric."""

TEXTS = ("english", "code")

HELD_OUT_ROWS = {"eval": 60, "test": 200}  # NumGLUE-cm has 41 and 81

RECORDED = "<!-- recorded -->\n"  # what follows is no command for the tests of the documentation


def command(model: Path, data: Path, tasks: Sequence[str]) -> list[str]:
    """Return the arguments of ``piece-ops`` that all runs share."""
    found = ["train", "--model", str(model)]
    for task in tasks:
        found += ["--task", f"{task}={data / task}", "--metric", f"{task}={METRICS[task]}"]
    for text in TEXTS:
        found += ["--general", f"{text}={CACHE / 'demo-data' / text}.txt"]
    found += ["--prompt-format", "plain", "--train-rows", "200"]
    # ScienceQA's answers are a letter and up to 800 tokens of reasons.
    found += ["--max-tokens", "192", "--max-answer-tokens", "32", "--max-new-tokens", "8"]
    found += ["--epochs", "1", "--batch-size", "4"]
    found += ["--window", "128", "--general-tokens", "2048"]
    return [*found, "--eval-batch-size", "25", "--no-report"]


def _sparse(name: str, method: str, rates: tuple[float, ...], *more: str) -> Variant:
    # Weights in bfloat16, masters of the trained ones in float32. full and lora stay in float32:
    # they write their updates into the weights, where bfloat16 would round most of them away.
    options = ("--method", method, "--density", "0.001", "--dtype", "bfloat16")
    return Variant(name, rates, (*options, "--importance-rows", "24", *more))


TOLERANCE = 1.05


def gentlest_of_the_best(runs: Sequence[dict[str, Any]]) -> float:
    """Return the smallest rate whose answer loss is at most 5 % above the best one's.

    The loss and not the score, because 60 rows of FOMC score every rate of most methods alike: the
    share of the most frequent letter. With a margin, because the very smallest loss is often that
    of a rate that ruins the model's general ability for a thousandth. The rule was made when the
    first half of the grid was known, before any test run.
    """
    best = min(run["summary"]["loss_final"] for run in runs)
    return float(min(r["lr"] for r in runs if r["summary"]["loss_final"] <= TOLERANCE * best))


REFERENCE = ("--reference-rows", "24")

STUDY = Study(
    tasks=tuple(METRICS),
    texts=TEXTS,
    variants=(
        _sparse("piece-g", "piece-g", (1e-3, 3e-3, 1e-2), *REFERENCE),
        _sparse("piece-g + statistics", "piece-g", (), *REFERENCE, "--keep-statistics"),
        _sparse("piece-f", "piece-f", (1e-4, 3e-4, 1e-3)),
        _sparse("piece-s", "piece-s", (3e-4, 1e-3, 3e-3)),
        _sparse("random", "random", (3e-3, 1e-2, 3e-2)),
        Variant("lora", (1e-4, 3e-4), ("--method", "lora")),
        Variant("full", (1e-5, 3e-5), ("--method", "full")),
    ),
    command=command,
    seeds=(0, 1),
    choose_on=1,
    rows=HELD_OUT_ROWS,
    same_rate={"piece-g + statistics": "piece-g"},
    choose=gentlest_of_the_best,
    rule="the smallest rate whose answer loss on eval rows is at most 5 % above the best one's",
)


# ---- the page ---------------------------------------------------------------------------------


def gain(run: dict[str, Any]) -> float:
    """Mean over tasks of the score right after learning it, less the base model's."""
    scores = run["accuracy"]
    return statistics.fmean(scores[i + 1][i] - scores[0][i] for i in range(len(STUDY.tasks)))


def loss_gain(run: dict[str, Any]) -> float:
    """The same of the answer loss, in nats: how far it fell."""
    losses = run["loss"]
    return statistics.fmean(losses[0][i] - losses[i + 1][i] for i in range(len(STUDY.tasks)))


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers of the table, averaged over seeds."""
    backward = [run["summary"]["accuracy_backward_transfer"] for run in runs]
    drift = [statistics.fmean(run["log_perplexity_drift"].values()) for run in runs]
    return {
        "OP": statistics.fmean(run["summary"]["accuracy_final"] for run in runs),
        "BWT": statistics.fmean(backward),
        "gain": statistics.fmean(map(gain, runs)),
        "loss gain": statistics.fmean(map(loss_gain, runs)),
        "d": statistics.fmean(drift),
    }


def summary_table(chosen: Sequence[dict[str, Any]]) -> str:
    """One line a method, means over seeds, and whether it lies on the fronts."""
    names = [v.name for v in STUDY.variants if any(run["method"] == v.name for run in chosen)]
    of = {name: [run for run in chosen if run["method"] == name] for name in names}
    means = {name: mean_of(runs) for name, runs in of.items()}
    fronts = {
        "forgetting": front([(-m["BWT"], m["gain"]) for m in means.values()]),
        "drift": front([(m["d"], m["gain"]) for m in means.values()]),
        "loss, drift": front([(m["d"], m["loss gain"]) for m in means.values()]),
    }
    header = ["method", "lr", "seeds", "OP", "BWT", "gain", "loss gain", "d"]
    rows = []
    for place, (name, mean) in enumerate(means.items()):
        row = [name, f"{of[name][0]['lr']:g}", str(len(of[name]))]
        row += [f"{100 * mean[key]:.1f}" for key in ("OP", "BWT", "gain")]
        row += [f"{mean['loss gain']:.3f}", f"{mean['d']:+.4f}"]
        rows.append([*row, *("front" if found[place] else "-" for found in fronts.values())])
    return format_table([*header, *fronts], rows)


def places(runs: Sequence[dict[str, Any]]) -> str:
    """Where the runs were made, and with what: a sentence for each machine."""
    found: dict[str, list[str]] = {}
    for run in runs:
        machine, versions = run["machine"], run["versions"]
        where = machine.get("gpu") or f"{machine['cpus']} CPU cores, {machine['instruction_set']}"
        with_ = f"torch {versions['torch']}, transformers {versions['transformers']}"
        found.setdefault(f"{where} ({with_})", []).append(f"{run['method']} {run['seed']}")
    if len(found) == 1:
        return f"On {next(iter(found))}."
    return " ".join(f"On {place}: {', '.join(names)}." for place, names in found.items())


def page(study: dict[str, Any]) -> str:
    """docs/trace.md."""
    seeds = sorted({run["seed"] for run in study["chosen"]})

    chosen_on, measured_on = HELD_OUT_ROWS["eval"], HELD_OUT_ROWS["test"]
    done = {(run["method"], run["seed"]) for run in study["chosen"]}
    wanted = [(v.name, seed) for seed in STUDY.seeds for v in STUDY.variants]
    missing = ", ".join(
        f"{name} with seed {seed}" for name, seed in wanted if (name, seed) not in done
    )
    gap = f" Not measured yet: {missing}." if missing else ""

    def table(runs: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
        labelled = [(f"{run['method']}, seed {run['seed']}", run) for run in runs]
        return f"{RECORDED}```\n{comparison_table(labelled, tasks, STUDY.texts)}\n```"

    shared = " ".join(command(Path("MODEL"), Path("DIR"), STUDY.tasks))
    options = "\n".join(f"{v.name:<22} {' '.join(v.options)}" for v in STUDY.variants)
    parts = [
        "# Three tasks of TRACE",
        "Made by `python -m bench.trace` from `bench/results/trace.json`; not edited by hand. "
        "SmolLM2-135M-Instruct learns FOMC, NumGLUE-cm and ScienceQA one after another, 200 "
        f"training rows each. Recorded until {study['date']}. {places(study['chosen'])}",
        f"Each method at the best of its learning rates: {study['rule']}, on the first task with "
        f"seed {STUDY.seeds[0]} ({chosen_on} rows, the recorded ones in batches of 20). Measured "
        f"on {measured_on} test rows a task (NumGLUE-cm has 81), the same for every seed: the "
        "standard error of one score is up to 3.5 points (NumGLUE-cm: 5.6), of OP and gain 2.5.",
        f"## Means over seeds ({', '.join(map(str, seeds))})",
        f"{RECORDED}```\n{summary_table(study['chosen'])}\n```",
        "OP, BWT, gain in points: mean score at the end; its change on earlier tasks since each "
        "was learned; mean over tasks of the score right after learning less the base model's. "
        "loss gain: how far the answer loss fell, likewise, in nats. d: rise of the log perplexity "
        "of general text (mean of English and code). The last three columns: whether no other "
        "method has at least as much for at most the same price: gain against forgetting (-BWT), "
        f"gain against d, loss gain against d.{gap}",
        "## Every run on test rows",
        table(study["chosen"], STUDY.tasks),
        "## Every run of the grid, eval rows",
        table(study["grid"], STUDY.tasks[: STUDY.choose_on]),
        "## What was run",
        f"{RECORDED}```\npiece-ops {shared}\n```",
        "and for each method, with `--lr`, `--seed`, `--held-out`:",
        f"{RECORDED}```\n{options}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run what is missing, write the results and the page; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the tasks; without it: only the page")
    parser.add_argument("--work", type=Path, default=CACHE / "trace", help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(STUDY.seeds))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.data:
        # The runs inherit both; see the demo for what the tunables do.
        os.environ.update(GLIBC_TUNABLES=GLIBC_TUNABLES, OMP_NUM_THREADS="1")
        study = replace(STUDY, seeds=tuple(arguments.seeds))
        model = prepare_model(CACHE)
        write_data(CACHE / "demo-data")
        folders = (model, arguments.data, arguments.work)
        found = Comparison(study, *folders, arguments.jobs, arguments.device).run()
        write_recorded(found, RESULTS)
    write_text(PAGE, page(json.loads(RESULTS.read_text(encoding="utf-8"))))
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
