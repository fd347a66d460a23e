"""What the demo runs: the command line of one run, and the grid of the comparison."""

from __future__ import annotations

from pathlib import Path

TASKS = ("zones", "names", "scripts")
"""In the order of learning."""

TEXTS = ("english", "code")

METHOD = "piece-g"
LR = 5e-3

GRID = {
    "piece-g": (2e-3, 3e-3, 5e-3),
    "piece-f": (1e-4, 3e-4),
    "piece-s": (3e-4, 1e-3),
    "random": (1e-2, 3e-2),
    "full": (1e-5, 3e-5),
}
"""Method -> the learning rates that are tried."""


def train_command(
    model: Path, data: Path, out: Path, *, method: str, lr: float, held_out: str
) -> list[str]:
    """Return the arguments of ``piece-ops`` for one run.

    Parameters
    ----------
    model, data, out : Path
        The model's folder, the folder of `demo.tasks.write_data`, the folder of the run.
    method : str
    lr : float
    held_out : {"test", "eval"}
        Which rows to measure on.

    Returns
    -------
    list of str
        ``["train", "--model", ...]``
    """
    command = ["train", "--model", str(model)]
    for task in TASKS:
        command += ["--task", f"{task}={data / task}"]
    for text in TEXTS:
        command += ["--general", f"{text}={data / text}.txt"]
    command += ["--method", method, "--lr", f"{lr:g}"]
    if method != "full":
        command += ["--density", "0.001"]
    # Plain text: the chat template of this model puts 30 tokens of system prompt before prompts of
    # 8, and the demo would take three times as long.
    command += ["--prompt-format", "plain", "--steps", "40", "--batch-size", "8"]
    command += ["--importance-rows", "24", "--held-out", held_out]
    command += ["--window", "128", "--general-tokens", "1024", "--eval-batch-size", "32"]
    return [*command, "--out", str(out), "--overwrite"]
