"""The results of a run: what was measured after every task, kept in ``results.json``.

Row 0 of every matrix is the base model, row i the model after task i. Numbers that are not finite
(a model that diverged) are written as null, since JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import piece_ops
from piece_ops import _native
from piece_ops._files import write_json
from piece_ops.training.extra import require
from piece_ops.training.memory import peak_rss_bytes
from piece_ops.training.output import FORMAT, RESULTS
from piece_ops.training.settings import Settings
from piece_ops.training.transfer import (
    Matrix,
    backward_transfer,
    curves,
    difference,
    forgetting,
    forward_transfer,
    mean,
    overall,
)

VERSION = 1


class ResultsError(ValueError):
    """There are no results to be read; the text says what was found instead."""


ROWS = ("accuracy", "loss", "general", "benchmarks")
"""The matrices of `Results`; each gets one row for the base model and one after every task."""


@dataclass
class TaskRecord:
    """What one task was and what its training did.

    Attributes
    ----------
    name, path, held_out_split, metric : str
    train_rows, held_out_rows, truncated_rows, cut_answers : int
        `truncated_rows` of both kinds lost the start of their prompt to `max_tokens`, and
        `cut_answers` the end of their answer to `max_answer_tokens`.
    trained : int or None
        Parameters trained; None before the task's turn.
    threshold : float or None
        Smallest score selected (None for ``full``).
    losses : list of float
        Training loss of every step.
    seconds : dict
        Wall time of the phases: ``select``, ``train``, ``evaluate``, ``general``, ``statistics``.
    memory : dict
        Most resident bytes in each of them; empty where the system does not tell. On a GPU also,
        as ``"<phase> (GPU)"``, the most bytes that torch had allocated there.
    """

    name: str
    path: str
    held_out_split: str
    train_rows: int
    held_out_rows: int
    truncated_rows: int
    metric: str = "exact"
    cut_answers: int = 0
    trained: int | None = None
    threshold: float | None = None
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


@dataclass
class TextRecord:
    """One general text: its name, its file and how many tokens of it are used."""

    name: str
    path: str
    tokens: int


@dataclass
class Results:
    """Everything a run reports.

    Attributes
    ----------
    model : str
        Folder or hub id of the base model.
    settings : Settings
    parameters : int
        N, all parameters of the model; a tied weight counts once.
    tasks : list of TaskRecord
        In the order of learning.
    texts : list of TextRecord
    accuracy, loss : list of rows
        Row i, column j: on task j after task i (row 0: the base model, all tasks); None where not
        measured. `accuracy` is the score of the task's metric, 0 to 1.
    general : list of rows
        Row i, column j: mean loss in nats per token on text j after task i; its exp is the
        perplexity.
    benchmarks : list of dict
        After each task (first: the base model) the scores of the lm_eval tasks, by task and metric.
    base_seconds, base_memory : dict
        Wall time and most resident bytes of loading and of measuring the base model, and of saving.
    peak_rss_bytes : int
        Most resident memory so far of any process that worked on the run.
    complete : bool
        Whether the run has reached its end.
    started : str
        UTC time.
    """

    model: str
    settings: Settings
    parameters: int
    tasks: list[TaskRecord]
    texts: list[TextRecord]
    accuracy: Matrix = field(default_factory=list)
    loss: Matrix = field(default_factory=list)
    general: Matrix = field(default_factory=list)
    benchmarks: list[dict[str, float]] = field(default_factory=list)
    base_seconds: dict[str, float] = field(default_factory=dict)
    base_memory: dict[str, int] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    complete: bool = False
    started: str = field(default_factory=lambda: utc_now())

    def summary(self) -> dict[str, float | None]:
        """Reduce the matrices to the usual few numbers.

        Returns
        -------
        dict
            ``accuracy_base``: mean over tasks of the base model; ``accuracy_learned``: mean of
            R[i][i], each task right after its own training; ``accuracy_final`` (OP),
            ``accuracy_backward_transfer`` (BWT; negative: forgetting),
            ``accuracy_forward_transfer`` (FWT) and ``accuracy_forgetting``, after the last task, as
            `piece_ops.training.transfer` defines them; ``loss_*`` likewise (for losses a positive
            ``loss_backward_transfer`` is forgetting); ``log_perplexity_drift``: mean over the texts
            of the last row minus row 0.
        """
        reached = len(self.accuracy) - 1
        numbers: dict[str, float | None] = {}
        for prefix, matrix, sign in (("accuracy", self.accuracy, 1), ("loss", self.loss, -1)):
            known = reached > 0
            learned = [matrix[i + 1][i] for i in range(reached)]
            numbers[f"{prefix}_base"] = mean(matrix[0][:reached]) if known else None
            numbers[f"{prefix}_learned"] = mean(learned)
            numbers[f"{prefix}_final"] = overall(matrix, reached) if known else None
            numbers[f"{prefix}_backward_transfer"] = backward_transfer(matrix, reached)
            numbers[f"{prefix}_forward_transfer"] = forward_transfer(matrix, reached)
            numbers[f"{prefix}_forgetting"] = forgetting(matrix, reached, sign)
        drift = []
        if len(self.general) > 1:
            drift = [
                difference(a, b) for a, b in zip(self.general[-1], self.general[0], strict=True)
            ]
        numbers["log_perplexity_drift"] = mean(drift)
        return numbers

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "started": self.started,
            "written": utc_now(),
            "model": self.model,
            "parameters": self.parameters,
            "settings": self.settings.as_dict(),
            "tasks": [finite(asdict(task)) for task in self.tasks],
            "texts": [asdict(text) for text in self.texts],
            "accuracy": finite(self.accuracy),
            "loss": finite(self.loss),
            "general_loss": finite(self.general),
            "benchmarks": self.benchmarks,
            "transfer": finite(curves(self.accuracy)),
            "summary": finite(self.summary()),
            "base_seconds": self.base_seconds,
            "base_memory": self.base_memory,
            "peak_rss_bytes": self.peak_rss_bytes,
            "versions": versions(),
            "machine": machine(),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Results:
        """Make results of what `as_dict` returned, or a results file (also an older one) holds."""
        return cls(
            model=value["model"],
            settings=Settings.from_dict(value["settings"]),
            parameters=value["parameters"],
            tasks=[TaskRecord(**task) for task in value["tasks"]],
            texts=[TextRecord(**text) for text in value["texts"]],
            accuracy=value["accuracy"],
            loss=value["loss"],
            general=value["general_loss"],
            benchmarks=value.get("benchmarks", []),
            base_seconds=value["base_seconds"],
            base_memory=value.get("base_memory", {}),
            peak_rss_bytes=value.get("peak_rss_bytes", 0),
            complete=value["complete"],
            started=value["started"],
        )

    def write(self, folder: Path) -> None:
        """Write ``results.json`` into `folder`, atomically."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes())
        write_json(folder / RESULTS, self.as_dict())


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def finite(value: Any) -> Any:
    """Replace floats that JSON cannot hold by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return value


def versions() -> dict[str, str]:
    """Return the versions that can change a result."""
    return {
        "piece_ops": piece_ops.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(require("transformers", "a run").__version__),
    }


def machine() -> dict[str, Any]:
    """Return what kind of machine this is, without naming it."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.describe()["isa"],
        "gpu": _native.describe()["gpu"],
    }


def read_results(folder: Path) -> tuple[Results, dict[str, Any]]:
    """Read ``results.json`` of a run, complete or not.

    Returns
    -------
    (Results, dict)
        The dict is the whole file, which also says with what versions and on what machine the run
        was made.

    Raises
    ------
    ResultsError
        If there is no such file, or it is damaged or of another release.
    """
    path = folder / RESULTS
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ResultsError(f"{path}: wanted the results of a run, got another file")
        if value.get("version") != VERSION:
            raise ResultsError(
                f"{path}: must have format version {VERSION}, got {value.get('version')}; it was "
                "written by another release of piece_ops"
            )
        return Results.from_dict(value), value
    except OSError as error:
        raise ResultsError(
            f"{folder}: wanted the folder of a run, got no {RESULTS} in it ({error.strerror})"
        ) from error
    except KeyError as error:
        raise ResultsError(
            f"{path}: it has no entry {error}; it was written by another release of piece_ops, or "
            "is damaged"
        ) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(
            f"{path}: cannot be read: {error}; it was written by another release of piece_ops, or "
            "is damaged"
        ) from error
