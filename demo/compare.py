"""The comparison: each method at its own best learning rate, chosen on eval, reported on test rows.

Every run of the grid is one ``piece-ops train`` in a process of its own. Each finished run is one
line of ``compare.jsonl``, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo.model import DemoError
from demo.settings import GRID, TASKS, TEXTS, train_command
from piece_ops._files import write_json
from piece_ops.training.report import format_table, nats, percent, points
from piece_ops.training.results import utc_now

RECORDED = Path(__file__).with_name("recorded.json")


def data_digest(data: Path) -> str:
    """Return the SHA-256 of all task files: rows measured on other data are not comparable."""
    digest = hashlib.sha256()
    for task in TASKS:
        for split in ("train", "eval", "test"):
            digest.update((data / task / f"{split}.jsonl").read_bytes())
    return digest.hexdigest()


def summarise(results: dict[str, Any], held_out: str) -> dict[str, Any]:
    """Reduce a ``results.json`` to what the comparison keeps of a run.

    Parameters
    ----------
    results : dict
    held_out : {"test", "eval"}

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
        "method": results["settings"]["method"],
        "lr": results["settings"]["lr"],
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
    """The grid, resumable.

    Parameters
    ----------
    model, data : Path
        The model's folder and the folder of the tasks.
    folder : Path
        For ``compare.jsonl`` and the runs.
    """

    def __init__(self, model: Path, data: Path, folder: Path) -> None:
        self.model, self.data, self.folder = model, data, folder
        self.lines = folder / "compare.jsonl"
        self.digest = data_digest(data)
        folder.mkdir(parents=True, exist_ok=True)

    def _key(self, method: str, lr: float, held_out: str) -> str:
        """Name a run by everything that decides its numbers."""
        command = train_command(
            Path("model"), Path("data"), Path("out"), method=method, lr=lr, held_out=held_out
        )
        return hashlib.sha256(json.dumps([command, self.digest]).encode()).hexdigest()[:16]

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

    def run_once(self, method: str, lr: float, held_out: str) -> dict[str, Any]:
        """Return a finished run, running it if it is not there yet."""
        key = self._key(method, lr, held_out)
        done = self._done()
        if key in done:
            return done[key]
        print(f"\n{method}, learning rate {lr:g}, measured on {held_out} rows", flush=True)
        out = self.folder / f"{method}-{lr:g}-{held_out}"
        command = train_command(self.model, self.data, out, method=method, lr=lr, held_out=held_out)
        child = [sys.executable, "-m", "piece_ops", *command, "--no-save-model"]
        status = subprocess.run(child, check=False).returncode
        if status != 0:
            raise DemoError(f"demo: the run {method} at {lr:g} ended with status {status}")
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        line = {"key": key, **summarise(results, held_out)}
        with self.lines.open("a", encoding="utf-8") as stream:
            # The newline first: after a line that an interruption cut off, this one starts anew.
            stream.write("\n" + json.dumps(line))
            stream.flush()
            os.fsync(stream.fileno())
        return line

    def run(self) -> dict[str, Any]:
        """Run what is missing of the grid, choose each method's rate, measure it on the test rows.

        Returns
        -------
        dict
            As in ``recorded.json``: ``grid`` (all runs, eval rows) and ``chosen`` (test rows).
        """
        grid = [self.run_once(m, lr, "eval") for m, rates in GRID.items() for lr in rates]
        chosen = [
            self.run_once(method, best_rate([r for r in grid if r["method"] == method]), "test")
            for method in GRID
        ]
        return {
            "date": utc_now()[:10],
            "rule": "the rate with the highest mean accuracy on eval rows after the last task; of "
            "equal ones the one with the smaller mean answer loss",
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


def comparison_table(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Write one line for each run: what it learned, what it forgot, what it cost.

    Parameters
    ----------
    runs : sequence of (label, dict)
        As `summarise` makes them.

    Returns
    -------
    str
    """
    header = ["method", "lr", "trained", *TASKS, "mean", "change", "answer loss"]
    header += [f"d {text}" for text in TEXTS]
    rows = []
    for label, run in runs:
        summary = run["summary"]
        row = [label, f"{run['lr']:g}", f"{run['trained']:,}"]
        row += [percent(value) for value in run["accuracy"][-1]]
        row += [percent(summary["accuracy_final"]), points(summary["accuracy_backward_transfer"])]
        row.append(nats(summary["loss_final"]))
        row += [nats(run["log_perplexity_drift"][text], sign=True) for text in TEXTS]
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
