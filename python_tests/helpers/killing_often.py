"""Runs killed at many moments and resumed: each must end with the bits of one that was not."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from helpers.killing import (
    check_readable,
    events,
    outcome,
    run_and_kill,
    run_to_end,
    run_until_event,
    warm_up,
)
from helpers.small_runs import KINDS, command, make_data

MOMENTS = ("training", "evaluation", "saving")
"""What a run must have been killed at; others are selection, statistics and loading."""

_NAMES = {"train": "training", "measure": "evaluation", "save": "saving"}
_LAST_WRITES = 12
"""Flushes and renamings at a run's end, when the model is saved and the folder put in place."""


def reached(out: Path) -> str:
    """What the killed run was at, from its state file."""
    state = out.with_name(out.name + ".unfinished") / "state.json"
    if not state.exists():
        return "done" if out.exists() else "loading"
    value = json.loads(state.read_text())
    phase = "save" if value["results"]["complete"] else str(value["phase"])
    return _NAMES.get(phase, phase)


def kill_often(data: Path, tmp_path: Path, kind: str, count: int, seed: int) -> Counter[str]:
    """Kill `count` runs at moments spread over their duration, some of them twice; compare."""
    draw = random.Random(seed)
    whole, log = tmp_path / "whole", tmp_path / "log"
    warm_up(log)
    duration = run_to_end(command(data, whole, kind), log)
    wanted, at = outcome(whole), Counter[str]()
    for i in range(count):
        out = tmp_path / f"killed-{i}"
        if run_and_kill(command(data, out, kind), log, duration * (i + draw.random()) / count):
            at[reached(out)] += 1
        resumed = [*command(data, out, kind), "--resume"]
        if i % 2:
            check_readable(tmp_path)
            if run_and_kill(resumed, log, duration * draw.random()):
                at[reached(out)] += 1
        end(data, out, kind, log, wanted)
    return at


def kill_saving(data: Path, tmp_path: Path, kind: str, count: int, seed: int) -> Counter[str]:
    """Kill `count` runs before one of their last writes, which are too quick to be hit by time."""
    draw = random.Random(seed)
    whole, log = tmp_path / "whole", tmp_path / "log"
    run_to_end([*command(data, whole, kind), "--overwrite"], log)
    wanted, every, at = outcome(whole), events(log), Counter[str]()
    for i in range(count):
        out = tmp_path / f"saving-{i}"
        event = draw.randrange(every - _LAST_WRITES, every)
        if run_until_event(command(data, out, kind), log, event):
            at[reached(out)] += 1
        end(data, out, kind, log, wanted)
    return at


def end(data: Path, out: Path, kind: str, log: Path, wanted: dict[str, object]) -> None:
    """Resume a killed run, all of whose files must be readable; it must come to what is wanted."""
    check_readable(out.parent)
    run_to_end([*command(data, out, kind), "--resume"], log)
    assert outcome(out) == wanted, (kind, out.name)
    assert not out.with_name(out.name + ".unfinished").exists()


def kill_every_kind(tmp_path: Path) -> Counter[str]:
    """At least 50 kills at random moments and some more while saving; how many where."""
    data = make_data(tmp_path / "data")
    at: Counter[str] = Counter()
    for i, (kind, count) in enumerate(zip(KINDS, (26, 8, 8, 8), strict=True)):
        folder = tmp_path / str(i)
        folder.mkdir()
        at += kill_often(data, folder, kind, count, seed=i)
        at += kill_saving(data, folder, kind, 2, seed=i)
    return at
