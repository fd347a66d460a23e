"""A thousand random deltas go round bit for bit; a thousand damaged files are never mistaken."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops import Delta, PieceModel, Selection

from helpers.deltas import same, snapshot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNT = 1000


class Odd(nn.Module):
    """Parameters of random shapes and dtypes, in a random tree, some of them tied."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        for n in range(rng.randint(1, 6)):
            shape = [rng.randint(1, 9) for _ in range(rng.randint(0, 4))]
            if rng.random() < 0.1:
                shape = [rng.randint(1100, 3000)]
            dtype = rng.choice(DTYPES)
            node = nn.Module()
            self.add_module(f"part{n}", node)
            weight = torch.randn(shape).to(dtype)
            if rng.random() < 0.3:  # any bits: NaN with payloads, infinities, subnormals
                weight = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
                weight = weight.view(dtype).reshape(shape)
            node.register_parameter(
                rng.choice(["weight", "indices", "values"]), nn.Parameter(weight)
            )
            if rng.random() < 0.2:
                self.register_parameter(f"tied{n}", next(node.parameters()))


def random_delta(rng: random.Random) -> tuple[nn.Module, Delta, dict[str, Tensor]]:
    """A model that holds the delta, the delta, and the base weights."""
    model = Odd(rng)
    base = snapshot(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    indices = {}
    for name, weight in base.items():
        if not indices or rng.random() < 0.7:
            count = rng.randint(1, weight.numel())
            indices[name] = torch.randperm(weight.numel())[:count].sort().values
    total = sum(weight.numel() for weight in base.values())
    wrapped = PieceModel(model, Selection(indices, shapes, total))
    with torch.no_grad():
        for values in wrapped.values.parameters():
            moved = torch.rand(values.shape) < 0.8
            values[moved] = torch.randn(int(moved.sum()))
    delta = wrapped.delta(changed_only=rng.random() < 0.5, task=rng.choice(["", "t", 'täsk\n\\"']))
    wrapped.unload()
    return model, delta, base


def test_round_trips(tmp_path: Path) -> None:
    rng = random.Random(5)
    for _ in range(COUNT):
        model, made, base = random_delta(rng)
        trained = snapshot(model)
        made.save(tmp_path / "d")
        delta = Delta.load(tmp_path / "d")
        assert delta.digest == made.digest
        delta.revert_(model)
        assert same(model, base)
        delta.apply_(model)
        assert same(model, trained)
        delta.revert_(model)
        assert same(model, base)


def damage(content: bytes, rng: random.Random) -> bytes:
    """One of the things that happen to files."""
    data = bytearray(content)
    place = rng.randrange(len(data))
    kind = rng.randrange(7)
    if kind == 0:
        return content[:place]
    if kind == 1:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[place] = rng.randrange(256)
    elif kind == 3:  # a block of zeros, as of a file that was never written
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == 4:
        data.insert(place, rng.randrange(256))
    elif kind == 5:
        del data[place]
    else:  # two blocks change places
        other = rng.randrange(len(data))
        size = min(8, len(data) - max(place, other))
        a, b = bytes(data[place : place + size]), bytes(data[other : other + size])
        data[place : place + size], data[other : other + size] = b, a
    return bytes(data)


def is_refused(path: Path, delta: Delta) -> bool:
    """Whether the file is refused; one that is read must hold every bit of the delta."""
    try:
        loaded = Delta.load(path)
    except (ValueError, OSError):
        return True
    assert loaded.digest == delta.digest
    return False


def test_damaged_files_are_never_mistaken(tmp_path: Path) -> None:
    rng = random.Random(6)
    path = tmp_path / "d"
    damaged = refused = 0
    while damaged < COUNT:
        _, delta, _ = random_delta(rng)
        delta.save(path)
        content = path.read_bytes()
        for _ in range(20):
            broken = damage(content, rng)
            if broken != content:
                damaged += 1
                path.write_bytes(broken)
                refused += is_refused(path, delta)
    assert refused >= 0.99 * damaged


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
