"""Scatters that are kept: lists checked once, two of them written in one pass over the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops._native import extension
from piece_ops.backends._lists import addresses, dtypes, sizes


class _Kept(NamedTuple):
    native: Any
    written: list[Tensor]  # the targets that have positions
    alive: tuple[Sequence[Tensor], Sequence[Tensor]]  # whose addresses `native` holds


class CpuScatters:
    """Scatters into the same CPU tensors, over and over.

    The caller sees to it that targets keep their addresses, and that nobody else writes the
    indices: they are not checked again. For 0.1 % of 135 M weights in 232 tensors a pass from
    Python costs about 0.1 ms less than half of two `scatter_` calls.

    Parameters
    ----------
    targets : list of Tensor
        Contiguous.
    """

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self._targets = targets
        self._arguments = addresses(targets), sizes(targets), dtypes(targets)

    def keep(self, indices: Sequence[Tensor], values: Sequence[Tensor]) -> _Kept:
        """A list of positions (maybe none) and values of the target's dtype for each target."""
        _schema.check_scatter_(self._targets, indices, values)
        native = extension().KeptScatter(
            *self._arguments, addresses(indices), sizes(indices), addresses(values)
        )
        written = [t for t, some in zip(self._targets, indices, strict=True) if some.numel()]
        return _Kept(native, written, (indices, values))

    def write(self, first: _Kept, second: _Kept) -> None:
        """Write both; where both have a position, the second one's value stays."""
        extension().scatter_two(first.native, second.native, torch.get_num_threads())
        _schema.bump_versions(first.written, second.written)
