"""How the samples of a batch lie in the tensors that a module takes and returns.

A layout is not guessed from shapes: `Sketch` compares what a module sees in a batch with what it
sees when one sample is alone (see `trial`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from piece_ops.importance.batches import Grid

_KEPT = 1024  # numbers of a tensor that are compared, evenly spread


class Layout(Enum):
    """Where sample n lies in a tensor."""

    ROWS = "row n, or its range of tokens in dimension 1"
    FLAT = "the n-th part of dimension 0, where the tokens of all samples follow one another"
    WHOLE = "everywhere: the tensor belongs to all samples alike"


def fits(shape: torch.Size, layout: Layout, grid: Grid) -> bool:
    """Whether a tensor of this shape can have the layout."""
    if layout is Layout.WHOLE:
        return True
    if grid.spans:
        head = (grid.rows, grid.tokens) if layout is Layout.ROWS else (grid.rows * grid.tokens,)
        return tuple(shape[: len(head)]) == head
    if layout is Layout.ROWS:
        return tuple(shape[:1]) == (grid.rows,)
    return len(shape) > 0 and shape[0] > grid.rows and shape[0] % grid.rows == 0


def cut(tensor: Tensor, layout: Layout, grid: Grid, sample: int) -> Tensor:
    """The part of one sample (a view)."""
    if layout is Layout.WHOLE:
        return tensor
    if grid.spans:
        row, first, end = grid.spans[sample]
        if layout is Layout.ROWS:
            return tensor[row : row + 1, first:end]
        return tensor[row * grid.tokens + first : row * grid.tokens + end]
    size = tensor.shape[0] // grid.rows
    return tensor[sample * size : (sample + 1) * size]


def offsets(shape: torch.Size, grid: Grid) -> Tensor:
    """Boundaries of the samples in a [..., features] tensor seen as [tokens, features]."""
    tokens = math.prod(shape[:-1])
    if not grid.spans:
        return torch.arange(grid.rows + 1) * (tokens // grid.rows)
    unit = tokens // (grid.rows * grid.tokens)  # heads, for instance
    begins = [row * grid.tokens + first for row, first, _ in grid.spans]
    return torch.tensor([*begins, grid.rows * grid.tokens]) * unit


@dataclass(frozen=True)
class Sketch:
    """Shape and a few numbers of a tensor."""

    shape: torch.Size
    numbers: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Sketch:
        flat = tensor.detach().reshape(-1)
        numbers = flat[:: max(1, flat.numel() // _KEPT)].to("cpu", torch.float64)
        # Masks hold -inf or the least number; beyond 1e4 all are alike here.
        return cls(tensor.shape, torch.nan_to_num(numbers).clamp_(-1e4, 1e4))

    def resembles(self, own: Sketch, other: Sketch, tolerance: float) -> bool:
        """Equal to `own` but for rounding, and not as near to `other`, where these two differ."""
        if self.shape != own.shape:
            return False
        room = tolerance * float(self.numbers.norm())
        error = float((self.numbers - own.numbers).norm())
        if error > room:
            return False
        if self.shape != other.shape:
            return True
        apart = float((self.numbers - other.numbers).norm())
        return apart <= room or error <= 0.5 * apart


@dataclass(frozen=True)
class ModuleLayout:
    """The layouts of a module's tensors, in the order of its arguments and results."""

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]

    def misfit(self, inputs: list[Tensor], outputs: list[Tensor], grid: Grid) -> bool:
        """Whether a call does not look like those that the layouts were learned from."""
        expected = (*self.inputs, *self.outputs)
        tensors = [*inputs, *outputs]
        return len(tensors) != len(expected) or not all(
            fits(tensor.shape, layout, grid)
            for tensor, layout in zip(tensors, expected, strict=True)
        )
