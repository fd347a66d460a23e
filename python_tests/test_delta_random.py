"""A thousand random deltas go round bit for bit; a thousand damaged files are never mistaken."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from piece_ops import Delta

from helpers.random_deltas import damaged_files, is_refused, round_trips

COUNT = 1000


def test_round_trips(tmp_path: Path) -> None:
    assert round_trips(COUNT, tmp_path) == COUNT


def test_damaged_files_are_never_mistaken(tmp_path: Path) -> None:
    refused, wrong = damaged_files(COUNT, tmp_path)
    assert wrong == 0 and refused >= 0.99 * COUNT


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    """Only the white space that pads the header may be other white space."""
    two = torch.ones(2, dtype=torch.bfloat16)
    shapes: dict[str, Any] = {"a": (3,)}
    dtypes = {"a": torch.bfloat16}
    path = tmp_path / "d"
    delta = Delta({"a": torch.tensor([0, 2])}, {"a": two}, {"a": -two}, shapes, dtypes, "f")
    delta.save(path)
    content = path.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    padding = range(len(header.rstrip(b" ")), len(header))
    rng = random.Random(7)
    for place in range(len(content)):
        flipped = content[place] ^ (1 << rng.randrange(8))
        for value in {flipped, *rng.sample(range(256), 2), *b" \n"} - {content[place]}:
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            assert is_refused(path, delta) or (place in padding and bytes([value]).isspace())
