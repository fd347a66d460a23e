"""A run read back from its folder, complete or not: results, selections, and where these lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piece_ops.selection import Selection
from piece_ops.training.blocks import numbered
from piece_ops.training.output import UNFINISHED, TaskFiles
from piece_ops.training.results import Results, read_results


@dataclass(frozen=True)
class Run:
    """What a run's folder tells.

    Attributes
    ----------
    folder : Path
    results : Results
    environment : dict
        Versions and machine of the last process that worked on it, and times.
    selections : list of (str, Selection)
        One for each task that has one, in the order of learning, with the task's place and name;
        with refreshing, of all that was selected within the task.
    """

    folder: Path
    results: Results
    environment: dict[str, Any]
    selections: list[tuple[str, Selection]]

    @property
    def name(self) -> str:
        """The folder's name, as it is or will be when the run is complete."""
        return self.folder.absolute().name.removesuffix(UNFINISHED)

    @property
    def reached(self) -> int:
        """How many tasks have been learned and measured."""
        return max(0, len(self.results.accuracy) - 1)

    @property
    def is_whole(self) -> bool:
        """Whether every task has been learned and measured."""
        return bool(self.results.tasks) and self.reached == len(self.results.tasks)


def read_run(folder: Path) -> Run:
    """Read the run in `folder`, or, where there is none, the one in ``<folder>.unfinished``.

    Raises
    ------
    ResultsError
        If there is no run, or one of another release.
    ValueError
        If one of its selections is damaged.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    if not folder.exists() and unfinished.exists():
        folder = unfinished
    results, value = read_results(folder)
    names = numbered(task.name for task in results.tasks)
    versions, machine = (value.get(key) or {} for key in ("versions", "machine"))
    environment = {**versions, **machine, "started": results.started}
    return Run(
        folder,
        results,
        {**environment, "written": value.get("written")},
        [
            (names[i], selection)
            for i, task in enumerate(results.tasks)
            if (selection := read_selection(folder, i, task.name)) is not None
        ],
    )


def read_selection(folder: Path, i: int, name: str) -> Selection | None:
    """Read all that was selected for task `i`, or None."""
    if not (folder / "selections").is_dir():
        return None
    found = [Selection.load(path) for path in TaskFiles.of(folder, i, name).selections()]
    if len(found) < 2:
        return found[0] if found else None
    return Selection(union(found), found[0].shapes, found[0].total, found[0].method)


def union(selections: Iterable[Selection]) -> dict[str, torch.Tensor]:
    """Return every coordinate that one of the selections has, by tensor, increasing."""
    parts: dict[str, list[torch.Tensor]] = {}
    for selection in selections:
        for tensor, positions in selection.indices.items():
            parts.setdefault(tensor, []).append(positions)
    return {tensor: torch.unique(torch.cat(several)) for tensor, several in parts.items()}
