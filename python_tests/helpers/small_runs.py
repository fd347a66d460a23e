"""Runs of a second on a tiny model, of every kind, from the command line."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny_lm import save_tiny, write_rows

PAIRS = [(f"{name}?", kind) for name in "abcdefghij" for kind in ("red", "blue")]

FILES = [("one", "one.jsonl"), ("two", "two.jsonl"), ("words", "words.txt")]

KINDS: dict[str, list[str]] = {
    "piece-g": ["--method", "piece-g", "--keep-statistics", "--protect", "--refresh", "3"],
    "piece-f in bfloat16": ["--method", "piece-f", "--dtype", "bfloat16"],
    "lora": ["--method", "lora"],
    "full": ["--method", "full"],
}


def make_data(folder: Path) -> Path:
    """A tiny model, two tasks and a text."""
    save_tiny(folder / "model", dropout=0.1)
    write_rows(folder / "one.jsonl", PAIRS)
    write_rows(folder / "two.jsonl", [(prompt, answer.upper()) for prompt, answer in PAIRS])
    (folder / "words.txt").write_text("the quick brown fox jumps over the lazy dog")
    return folder


def command(data: Path, out: Path, kind: str) -> list[str]:
    """The arguments of ``piece-ops`` for a run of this kind."""
    options = ["train", "--model", str(data / "model"), "--out", str(out), *KINDS[kind]]
    one, two, words = (f"{name}={data / file}" for name, file in FILES)
    options += ["--task", one, "--task", two, "--metric", "two=letter", "--general", words]
    options += ["--window", "16", "--density", "0.02"]
    options += ["--steps", "8", "--batch-size", "4", "--importance-rows", "6", "--lr", "0.01"]
    options += ["--reference-rows", "2", "--reference-tokens", "6", "--checkpoint-every", "2"]
    options += ["--no-report"]
    return options
