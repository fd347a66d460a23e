"""Runs that are one but for their seed, and how each is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from piece_ops.training.reading import Run
from piece_ops.training.sections import gain
from piece_ops.training.transfer import mean

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Variant:
    """Runs with the same settings, seeds aside.

    Attributes
    ----------
    label : str
        Method, learning rate and whatever else differs among all runs.
    series : str
        The same without the learning rate: what one line of a figure is.
    lr : float
    runs : tuple of Run
    """

    label: str
    series: str
    lr: float
    runs: tuple[Run, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all of its runs have learned all their tasks."""
        return all(run.is_whole for run in self.runs)

    @property
    def numbers(self) -> Numbers:
        """The mean of `numbers` over its runs; None where one of them has none."""
        each = [numbers(run) for run in self.runs]
        return {key: mean([of[key] for of in each]) for key in each[0]}


def numbers(run: Run) -> Numbers:
    """Return what runs are compared by: `Results.summary`, gain, log perplexity, minutes, bytes."""
    results = run.results
    every = [results.base_seconds, *(task.seconds for task in results.tasks)]
    return {
        **results.summary(),
        "gain": gain(results),
        "log_perplexity": mean(list(results.general[-1])) if results.general else None,
        "minutes": sum(sum(seconds.values()) for seconds in every) / 60,
        "bytes": float(results.peak_rss_bytes) or None,
    }


def labels(runs: Sequence[Run]) -> list[str]:
    """Name each run by its method, learning rate and whatever else differs; by its folder if equal.

    Returns
    -------
    list of str
        All different.
    """
    others = _differing(runs, ("method", "lr"))
    found = [_label(run, ("lr", *others)) for run in runs]
    return [
        f"{label} ({run.name}, {i})" if found.count(label) > 1 else label
        for i, (label, run) in enumerate(zip(found, runs, strict=True), start=1)
    ]


def variants(runs: Sequence[Run]) -> list[Variant]:
    """Put runs together that differ in their seed only; others keep their names of `labels`."""
    others = _differing(runs, ("method", "lr", "seed"))
    groups: dict[str, list[Run]] = {}
    for run, name in zip(runs, labels(runs), strict=True):
        label = _label(run, ("lr", *others))
        # Two runs of one seed are not two seeds: what else tells them apart is in their names.
        same = [other for other in runs if _label(other, ("lr", *others)) == label]
        is_repeated = len({other.results.settings.seed for other in same}) < len(same)
        groups.setdefault(name if is_repeated else label, []).append(run)
    return [
        Variant(label, _label(of[0], others), of[0].results.settings.lr, tuple(of))
        for label, of in groups.items()
    ]


def _differing(runs: Sequence[Run], known: Sequence[str]) -> list[str]:
    settings = [run.results.settings.as_dict() for run in runs]
    return [
        key
        for key in settings[0]
        if key not in known and any(s[key] != settings[0][key] for s in settings)
    ]


def _label(run: Run, keys: Sequence[str]) -> str:
    values: dict[str, Any] = run.results.settings.as_dict()
    parts = [values["method"]]
    for key in keys:
        value = values[key]
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        if value is True:
            parts.append(key)
        elif value is not False and value not in (None, "self"):
            parts.append(f"{key} {shown}")
    if not run.is_whole:
        parts.append(f"{run.reached} of {len(run.results.tasks)} tasks")
    return ", ".join(parts).replace("_", " ")
