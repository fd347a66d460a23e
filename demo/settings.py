"""What the demo runs: the command line of one run, and the grid of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from demo.compare import Job, Study, Variant

TASKS = ("zones", "names", "scripts")
"""In the order of learning."""

TEXTS = ("english", "code")


def command(model: Path, data: Path, tasks: Sequence[str]) -> list[str]:
    """Return the arguments of ``piece-ops`` that all runs share.

    Parameters
    ----------
    model, data : Path
        The model's folder, the folder of `demo.tasks.write_data`.
    tasks : sequence of str

    Returns
    -------
    list of str
        ``["train", "--model", ...]``
    """
    found = ["train", "--model", str(model)]
    for task in tasks:
        found += ["--task", f"{task}={data / task}"]
    for text in TEXTS:
        found += ["--general", f"{text}={data / text}.txt"]
    # Plain text: the chat template of this model puts 30 tokens of system prompt before prompts of
    # 8, and the demo would take three times as long.
    found += ["--prompt-format", "plain", "--steps", "40", "--batch-size", "8"]
    found += ["--importance-rows", "24", "--window", "128", "--general-tokens", "1024"]
    return [*found, "--eval-batch-size", "32"]


def _sparse(method: str, *rates: float) -> Variant:
    return Variant(method, rates, ("--method", method, "--density", "0.001"))


STUDY = Study(
    tasks=TASKS,
    texts=TEXTS,
    variants=(
        _sparse("piece-g", 2e-3, 3e-3, 5e-3),
        _sparse("piece-f", 1e-4, 3e-4),
        _sparse("piece-s", 3e-4, 1e-3),
        _sparse("random", 1e-2, 3e-2),
        Variant("full", (1e-5, 3e-5), ("--method", "full")),
    ),
    command=command,
)

SHOWN = Job(STUDY.variants[0], 3e-3, "test", seed=0)
"""What ``make demo`` runs: the best of the recorded grid."""
