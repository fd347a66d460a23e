"""Random models with random deltas, and files damaged as files are."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn

from piece_ops import Delta, PieceModel, Selection

from helpers.deltas import same, snapshot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def round_trips(count: int, folder: Path) -> int:
    """How many of `count` deltas, saved and loaded, are reverted, applied and reverted exactly."""
    rng = random.Random(5)
    right = 0
    for _ in range(count):
        model, made, base = random_delta(rng)
        trained = snapshot(model)
        made.save(folder / "d")
        delta = Delta.load(folder / "d")
        delta.revert_(model)
        is_right = delta.digest == made.digest and same(model, base)
        delta.apply_(model)
        is_right &= same(model, trained)
        delta.revert_(model)
        right += is_right and same(model, base)
    return right


class WrongAccept(AssertionError):
    """A damaged file was read, and as something else than it was."""


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
    if loaded.digest != delta.digest:
        raise WrongAccept(f"{path} was read as another delta")
    return False


def damaged_files(count: int, folder: Path) -> tuple[int, int]:
    """Damage `count` files: how many are refused, and how many are taken for another delta.

    The others are read as what they were: the damage was in the white space of the header.
    """
    rng = random.Random(6)
    path = folder / "d"
    damaged = refused = wrong = 0
    while damaged < count:
        _, delta, _ = random_delta(rng)
        delta.save(path)
        content = path.read_bytes()
        for _ in range(20):
            broken = damage(content, rng)
            if broken != content and damaged < count:
                damaged += 1
                path.write_bytes(broken)
                try:
                    refused += is_refused(path, delta)
                except WrongAccept:
                    wrong += 1
    return refused, wrong
