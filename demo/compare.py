"""A comparison: each method at its own best learning rate, chosen on eval, reported on test rows.

Every run of the grid is one ``piece-ops train`` in a process of its own. Each finished run is one
line of ``compare.jsonl``, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo.model import DemoError
from piece_ops._files import write_json
from piece_ops.training.report import format_table, nats, percent, points
from piece_ops.training.results import utc_now

RECORDED = Path(__file__).with_name("recorded.json")


@dataclass(frozen=True)
class Variant:
    """One way to learn: its name in tables, the learning rates to try, and its options."""

    name: str
    rates: tuple[float, ...]
    options: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes
    ----------
    tasks : tuple of str
        In the order of learning.
    texts : tuple of str
        General texts.
    variants : tuple of Variant
    command : callable
        Gets the model's folder, the data's folder and the tasks to learn; returns the arguments of
        ``piece-ops`` that all runs share.
    seeds : tuple of int
        With the first one rates are chosen; every chosen rate is measured with each.
    choose_on : int, optional
        Rates are chosen on so many tasks, from the first; None: all.
    rows : dict of str to int
        How many rows of each task are measured on: ``{"eval": ..., "test": ...}``; {}: all.
    same_rate : dict of str to str
        Variants that take the rate of another one instead of choosing their own.
    choose, rule : callable, str
        Gets the runs of a variant on eval rows and returns the rate; the same in words.
    """

    tasks: tuple[str, ...]
    texts: tuple[str, ...]
    variants: tuple[Variant, ...]
    command: Callable[[Path, Path, Sequence[str]], list[str]]
    seeds: tuple[int, ...] = (0,)
    choose_on: int | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    same_rate: Mapping[str, str] = field(default_factory=dict)
    choose: Callable[[Sequence[dict[str, Any]]], float] = field(default=lambda r: best_rate(r))
    rule: str = (
        "the rate with the highest mean accuracy on eval rows after the last task; of equal ones "
        "the one with the smaller mean answer loss"
    )

    def run_command(self, model: Path, data: Path, out: Path, job: Job) -> list[str]:
        """Return the arguments of ``piece-ops`` for one run: ``["train", "--model", ...]``."""
        tasks = self.tasks[: self.choose_on] if job.held_out == "eval" else self.tasks
        return [
            *self.command(model, data, tasks),
            *job.variant.options,
            *("--lr", f"{job.lr:g}", "--seed", str(job.seed), "--held-out", job.held_out),
            *(("--held-out-rows", str(self.rows[job.held_out])) if self.rows else ()),
            *("--out", str(out), "--overwrite"),
        ]


@dataclass(frozen=True)
class Job:
    """One run of a study; `held_out` is ``"eval"`` (to choose a rate) or ``"test"``."""

    variant: Variant
    lr: float
    held_out: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant.name}-{self.lr:g}-{self.held_out}-{self.seed}"


def data_digest(data: Path, tasks: Sequence[str]) -> str:
    """Return the SHA-256 of all task files: rows measured on other data are not comparable."""
    digest = hashlib.sha256()
    for task in tasks:
        for split in ("train", "eval", "test"):
            digest.update((data / task / f"{split}.jsonl").read_bytes())
    return digest.hexdigest()


def summarise(results: dict[str, Any], held_out: str, name: str) -> dict[str, Any]:
    """Reduce a ``results.json`` to what the comparison keeps of a run.

    Parameters
    ----------
    results : dict
    held_out : {"test", "eval"}
    name : str
        Of the variant.

    Returns
    -------
    dict
        Method, rate, matrices, summary, drift of each text, seconds.
    """
    general = results["general_loss"]
    drift = {
        text["name"]: None if None in (last, first) else last - first
        for text, last, first in zip(results["texts"], general[-1], general[0], strict=True)
    }
    seconds: dict[str, float] = dict(results["base_seconds"])
    for task in results["tasks"]:
        for phase, value in task["seconds"].items():
            seconds[phase] = round(seconds.get(phase, 0.0) + value, 2)
    return {
        "method": name,
        "lr": results["settings"]["lr"],
        "seed": results["settings"]["seed"],
        "held_out": held_out,
        "trained": results["tasks"][0]["trained"],
        "accuracy": results["accuracy"],
        "loss": results["loss"],
        "general_loss": general,
        "log_perplexity_drift": drift,
        "summary": results["summary"],
        "seconds": seconds,
        "peak_rss_bytes": results["peak_rss_bytes"],
        "versions": results["versions"],
        "machine": results["machine"],
        "finished": results["written"],
    }


class Comparison:
    """A study's runs, resumable.

    Parameters
    ----------
    study : Study
    model, data : Path
        The model's folder and the folder of the tasks.
    folder : Path
        For ``compare.jsonl`` and the runs.
    jobs : int
        Runs at a time.
    device : {"cpu", "cuda"}
        Where they run. A run that was finished on another one counts as finished.
    """

    def __init__(
        self,
        study: Study,
        model: Path,
        data: Path,
        folder: Path,
        jobs: int = 1,
        device: str = "cpu",
    ) -> None:
        self.study, self.model, self.data, self.folder = study, model, data, folder
        self.jobs, self.device = jobs, device
        self.lines = folder / "compare.jsonl"
        self.digest = data_digest(data, study.tasks)
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def _key(self, job: Job) -> str:
        """Name a run by everything that decides its numbers, but for where they are rounded."""
        command = self.study.run_command(Path("model"), Path("data"), Path("out"), job)
        text = json.dumps([job.variant.name, command, self.digest])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _done(self) -> dict[str, dict[str, Any]]:
        """Read the finished runs; a line cut off by an interruption is run again."""
        found = {}
        if self.lines.exists():
            for line in self.lines.read_text(encoding="utf-8").splitlines():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found[value["key"]] = value
        return found

    def run_once(self, job: Job) -> dict[str, Any]:
        """Return a finished run, running it if it is not there yet."""
        key = self._key(job)
        with self._lock:
            done = self._done()
        if key in done:
            return done[key]
        print(f"\n{job}: to learn and to measure", flush=True)
        out = self.folder / str(job)
        command = self.study.run_command(self.model, self.data, out, job)
        child = [sys.executable, "-m", "piece_ops", *command, "--no-save-model"]
        child += ["--device", self.device]
        status = subprocess.run(child, check=False).returncode
        if status != 0:
            raise DemoError(f"the run {job} ended with status {status}")
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        line = {"key": key, **summarise(results, job.held_out, job.variant.name)}
        with self._lock, self.lines.open("a", encoding="utf-8") as stream:
            # The newline first: after a line that an interruption cut off, this one starts anew.
            stream.write("\n" + json.dumps(line))
            stream.flush()
            os.fsync(stream.fileno())
        return line

    def _run_all(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        if self.jobs == 1:
            return [self.run_once(job) for job in jobs]
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(self.run_once, jobs))

    def run(self) -> dict[str, Any]:
        """Run what is missing of the grid, choose each variant's rate, measure it on test rows.

        Returns
        -------
        dict
            As in ``recorded.json``: ``grid`` (all runs, eval rows) and ``chosen`` (test rows).
        """
        study = self.study
        grid = self._run_all(
            [Job(v, lr, "eval", study.seeds[0]) for v in study.variants for lr in v.rates]
        )
        best = {}
        for v in study.variants:
            name = study.same_rate.get(v.name, v.name)
            best[v.name] = study.choose([run for run in grid if run["method"] == name])
        chosen = self._run_all(
            [Job(v, best[v.name], "test", seed) for seed in study.seeds for v in study.variants]
        )
        return {
            "date": utc_now()[:10],
            "rule": study.rule,
            "data_sha256": self.digest,
            "tzdata": version("tzdata"),
            "machine": chosen[0]["machine"],
            "versions": chosen[0]["versions"],
            "chosen": chosen,
            "grid": grid,
        }


def best_rate(runs: Sequence[dict[str, Any]]) -> float:
    """Return the rate with the highest final accuracy, of equal ones the one with the smaller loss.

    Parameters
    ----------
    runs : sequence of dict
        Runs of one method, as `summarise` makes them; one that diverged counts as worst.

    Examples
    --------
    >>> low = {"lr": 1e-3, "summary": {"accuracy_final": 0.5, "loss_final": 1.0}}
    >>> high = {"lr": 1e-2, "summary": {"accuracy_final": 0.5, "loss_final": 0.9}}
    >>> best_rate([low, high])
    0.01
    """

    def merit(run: dict[str, Any]) -> tuple[float, float]:
        summary = run["summary"]
        loss = summary["loss_final"]
        return summary["accuracy_final"], -(float("inf") if loss is None else loss)

    return float(max(runs, key=merit)["lr"])


def comparison_table(
    runs: Sequence[tuple[str, dict[str, Any]]], tasks: Sequence[str], texts: Sequence[str]
) -> str:
    """Write one line for each run: what it learned, what it forgot, what it cost.

    Parameters
    ----------
    runs : sequence of (label, dict)
        As `summarise` makes them.
    tasks, texts : sequence of str
        Their names, in the order of the runs' matrices.

    Returns
    -------
    str
    """
    header = ["method", "lr", "trained", *tasks, "mean", "change", "answer loss"]
    header += [f"d {text}" for text in texts]
    rows = []
    for label, run in runs:
        summary = run["summary"]
        row = [label, f"{run['lr']:g}", f"{run['trained']:,}"]
        row += [percent(value) for value in run["accuracy"][-1]]
        row += [percent(summary["accuracy_final"]), points(summary["accuracy_backward_transfer"])]
        row.append(nats(summary["loss_final"]))
        row += [nats(run["log_perplexity_drift"][text], sign=True) for text in texts]
        rows.append(row)
    return format_table(header, rows)


def read_recorded() -> dict[str, Any] | None:
    """Return the recorded comparison, None when there is none in this tree."""
    if not RECORDED.exists():
        return None
    value: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return value


def write_recorded(comparison: dict[str, Any], path: Path) -> None:
    """Write a comparison; the runs' long keys are left out."""
    short = {
        name: [{k: v for k, v in run.items() if k != "key"} for run in value]
        if name in ("grid", "chosen")
        else value
        for name, value in comparison.items()
    }
    write_json(path, short)
