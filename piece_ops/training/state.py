"""How far a run is, and what it is: the file that ``--resume`` starts from.

``state.json`` is written, whole, after every phase of every task. What it says is done is on the
disk; files of phases that it does not know are made again, with the same content.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piece_ops._files import write_json
from piece_ops.training.output import STATE, STATE_FORMAT, OutputError
from piece_ops.training.results import ROWS, Results, TaskRecord, finite, machine, versions

VERSION = 1

PHASES = ("select", "train", "statistics", "measure")
"""Of every task; the base model is measured only. ``save`` comes after the last task, and
``extend`` after that, when tasks are appended."""

_BY_TASK = ("task metric", "task content", "tokens of task")


class ResumeError(OutputError):
    """The run that is there is not the one that was asked for; nothing has been changed."""


@dataclass
class RunState:
    """What is complete.

    Attributes
    ----------
    identity : dict
        Everything that decides the run's numbers, by what it is; see `Data.identity`.
    made_with : dict
        Versions and threads, on which the last bits depend.
    results : Results
    place : int
        The task at work, from 1; 0 is the base model.
    phase : str
        The phase to do next, one of `PHASES`, ``"save"`` or ``"extend"``.
    row : dict of str to list
        The rows of the result matrices under way, as far as they are measured.
    """

    identity: dict[str, Any]
    made_with: dict[str, Any]
    results: Results
    place: int = 0
    phase: str = "measure"
    row: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in ROWS})

    def advance(self) -> None:
        """Go to the next phase."""
        if self.phase == "extend":
            self.place, self.phase = self.place + 1, PHASES[0]
        elif self.phase != PHASES[-1]:
            self.phase = PHASES[PHASES.index(self.phase) + 1]
        elif self.place < len(self.results.tasks):
            self.place, self.phase = self.place + 1, PHASES[0]
        else:
            self.phase = "save"

    @property
    def trained(self) -> int:
        """How many tasks have been trained to their end."""
        untrained = self.phase in PHASES[:2]
        return self.place - 1 if untrained else self.place

    @property
    def kept_statistics(self) -> int:
        """For how many tasks the statistics are kept, if they are kept at all."""
        return self.place if self.phase in ("measure", "save", "extend") else self.place - 1

    def write(self, folder: Path) -> None:
        """Write ``state.json`` into `folder`, atomically."""
        value = {
            "format": STATE_FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "made_with": self.made_with,
            "place": self.place,
            "phase": self.phase,
            "row": finite(self.row),
            "results": self.results.as_dict(),
        }
        write_json(folder / STATE, value)

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read ``state.json`` of a run.

        Raises
        ------
        ResumeError
            If it is not there, damaged, or of another release.
        """
        path = folder / STATE
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["version"] != VERSION:
                raise ResumeError(
                    f"resume: {path} must have format version {VERSION}, got {value['version']}; "
                    "it was written by another release of piece_ops"
                )
            return cls(
                identity=value["identity"],
                made_with=value["made_with"],
                results=Results.from_dict(value["results"]),
                place=int(value["place"]),
                phase=str(value["phase"]),
                row=value["row"],
            )
        except OSError as error:
            raise ResumeError(f"resume: {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ResumeError):
                raise
            raise ResumeError(f"resume: {path} is damaged: {error!r}") from error

    def appended(self, identity: dict[str, Any]) -> int:
        """Count the tasks that a run has after those of this complete one.

        Raises
        ------
        ResumeError
            If anything else differs, naming every difference; or with tasks appended to ``full``,
            which leaves nothing on the disk but its last model.
        """
        now = json.loads(json.dumps(identity))
        then, names = (list(of["task metric"]) for of in (self.identity, now))
        count = len(names) - len(then) if names[: len(then)] == then else 0
        if count:
            now["task names"] = ", ".join(then)
            for key in _BY_TASK:
                now[key] = {name: now[key][name] for name in then}
        self.check_same(now)
        if count and self.results.settings.method == "full":
            raise ResumeError(
                "resume: tasks can be appended to methods that keep what each task changed, got "
                "full; start a new run from its model"
            )
        return count

    def extend(self, identity: dict[str, Any], records: list[TaskRecord]) -> None:
        """Append tasks to a complete run, which is then to be gone on with.

        Parameters
        ----------
        identity : dict
            Of the longer run.
        records : list of TaskRecord
            Of the tasks appended.
        """
        self.identity, self.phase = identity, "extend"
        results = self.results
        results.tasks += records
        results.complete = False
        for matrix in (results.accuracy, results.loss):
            for row in matrix:
                row += [None] * len(records)

    def check_same(self, identity: dict[str, Any]) -> None:
        """Raise ResumeError, naming every difference, unless the run is the one described."""
        found = differences(self.identity, json.loads(json.dumps(identity)))
        if found:
            raise ResumeError(
                "resume: the run was started with other settings or data: "
                + "; ".join(found)
                + ". Give the same ones (tasks can be appended to a complete run), or start anew "
                "with --overwrite"
            )


def made_with() -> dict[str, Any]:
    """Return what the last bits of a result depend on, beside the run itself."""
    found = machine()
    kept = ("architecture", "instruction_set", "threads", "gpu")
    return {**versions(), **{key: found[key] for key in kept}}


def differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Name every entry in which two nested dicts of plain values differ."""
    found = []
    for key in [*then, *(key for key in now if key not in then)]:
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key} ")
        elif a != b:
            found.append(f"{prefix}{key} was {_shown(a)}, is {_shown(b)}")
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
