"""``python -m bench.reliability``: what must never fail and stay small, measured beside its target.

Not part of ``make bench``, since it takes minutes; needs what the tests need, whose helpers do the
work. Rows: ``kills`` (a tiny model of each kind of run, killed and resumed), ``round-trips``,
``damaged-files``, ``checkpoint`` (SmolLM2-135M in transformers' Trainer). Bytes on disk and the
time of a switch are rows of ``python -m bench delta``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KILLS, FILES, CHECKPOINT_BYTES = 50, 1000, 3e6


@dataclass(frozen=True)
class Found:
    """What was measured, and whether the target is met."""

    target: str
    measured: str
    is_met: bool


def kills(folder: Path) -> Found:
    """Kill runs as ``kill -9`` does, at random moments; resume them; compare every file."""
    from helpers.killing_often import MOMENTS, kill_every_kind

    target = f"{KILLS} of {KILLS} end bit-identical, no unreadable file"
    try:
        at = kill_every_kind(folder)
    except AssertionError as error:
        return Found(target, f"one did not: {error}", False)
    where = ", ".join(f"{moment} {count}" for moment, count in sorted(at.items()))
    is_met = at.total() >= KILLS and all(at[moment] for moment in MOMENTS)
    return Found(target, f"{at.total()} of {at.total()}; killed at: {where}", is_met)


def round_trips(folder: Path) -> Found:
    """Random models, dtypes and selections: save, load, revert, apply, revert."""
    from helpers.random_deltas import round_trips

    right = round_trips(FILES, folder)
    return Found(f"{FILES} restore every bit", f"{right} of {FILES}", right == FILES)


def damaged_files(folder: Path) -> Found:
    """Delta files cut, flipped, zeroed, shifted."""
    from helpers.random_deltas import damaged_files

    refused, wrong = damaged_files(FILES, folder)
    harmless = FILES - refused - wrong
    return Found(
        f"0 wrong accepts of {FILES}",
        f"{wrong} wrong, {refused} refused, {harmless} damaged in white space only and read right",
        wrong == 0,
    )


def checkpoint(folder: Path) -> Found:
    """The last checkpoint of examples/hf_trainer.py on SmolLM2-135M-Instruct at 0.1 %."""
    sys.path.insert(0, str(ROOT / "examples"))
    import hf_trainer

    from demo.model import prepare_model

    model = prepare_model(ROOT / ".cache")
    with contextlib.redirect_stdout(io.StringIO()):
        hf_trainer.main(["--model", str(model), "--out", str(folder), "--steps", "2"])
    found = sum(path.stat().st_size for path in (folder / "checkpoint-2").iterdir())
    return Found(f"<= {CHECKPOINT_BYTES:,.0f} bytes", f"{found:,}", found <= CHECKPOINT_BYTES)


ROWS: dict[str, Callable[[Path], Found]] = {
    "kills": kills,
    "round-trips": round_trips,
    "damaged-files": damaged_files,
    "checkpoint": checkpoint,
}


def main() -> int:
    """Print a row for each; 1 when one falls short."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (all)")
    rows = parser.parse_args().rows or list(ROWS)
    for row in rows:
        if row not in ROWS:
            parser.error(f"ROW must be one of {', '.join(ROWS)}, got {row}")
    sys.path.insert(0, str(ROOT / "python_tests"))
    is_met = True
    for row in rows:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = ROWS[row](Path(folder))
        verdict = "met" if found.is_met else "SHORT"
        seconds = time.monotonic() - start
        print(
            f"{row}: target {found.target}; measured {found.measured}: {verdict} ({seconds:.0f} s)"
        )
        sys.stdout.flush()
        is_met &= found.is_met
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
