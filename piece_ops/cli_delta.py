"""``piece-ops delta``: show, apply, revert and diff on files and model folders.

Needs torch and safetensors only: no model is built and no folder is loaded as a whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from piece_ops.delta import Delta, diff, rewrite


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add ``delta`` and its commands to the subparsers of ``piece-ops``; the parsers made."""
    delta = commands.add_parser("delta", help="show, apply, revert and find what a task changed")
    parts = delta.add_subparsers(dest="part", required=True)

    show = parts.add_parser("show", help="what one delta holds, or what several have in common")
    show.add_argument("files", nargs="+", type=Path, metavar="DELTA", help="delta file")
    show.set_defaults(function=_show)

    made = [show]
    for name, does in (("apply", "write a delta into"), ("revert", "take a delta out of")):
        part = parts.add_parser(name, help=f"{does} the safetensors files of a model folder")
        part.add_argument("file", type=Path, metavar="DELTA", help="delta file")
        part.add_argument("model", type=Path, metavar="MODEL", help="model folder, or one file")
        part.add_argument(
            "--out", type=Path, metavar="DIR", help="write a new folder instead of changing MODEL"
        )
        part.add_argument(
            "--no-strict",
            action="store_true",
            help="compare the delta's own coordinates only, not the rest of the base model",
        )
        part.set_defaults(function=_rewrite)
        made.append(part)

    found = parts.add_parser("diff", help="the delta between two model folders, bit by bit")
    found.add_argument("before", type=Path, metavar="BEFORE", help="model folder, or one file")
    found.add_argument("after", type=Path, metavar="AFTER", help="model folder, or one file")
    found.add_argument("--out", type=Path, metavar="DELTA", help="also save the delta")
    found.add_argument("--task", default="", help="what was learned, kept in the delta")
    found.add_argument("--base", help="name of the base model, kept in the delta (default: BEFORE)")
    found.set_defaults(function=_diff)
    return [*made, found]


def _show(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops delta show``."""
    deltas = [Delta.load(path) for path in arguments.files]
    for path, delta in zip(arguments.files, deltas, strict=True):
        print(f"{path}\n{delta.show()}\n")
    for n, first in enumerate(deltas):
        for m in range(n + 1, len(deltas)):
            overlap = first.overlap(deltas[m])
            print(
                f"{arguments.files[n]} and {arguments.files[m]}: {overlap.shared:,} coordinates in "
                f"both ({100 * overlap.jaccard:.2f} % of all), {overlap.conflicting:,} with other "
                "values"
            )
    return 0


def _rewrite(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops delta apply`` or ``revert``."""
    delta = Delta.load(arguments.file)
    count = rewrite(
        delta,
        arguments.model,
        arguments.out,
        revert=arguments.part == "revert",
        strict=not arguments.no_strict,
    )
    where = arguments.out or arguments.model
    print(f"{arguments.part}: {delta.k:,} weights in {count} files of {where}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops delta diff``."""
    delta = diff(arguments.before, arguments.after, task=arguments.task, base=arguments.base)
    print(delta.show())
    if arguments.out:
        delta.save(arguments.out)
        print(f"written to {arguments.out}")
    return 0
