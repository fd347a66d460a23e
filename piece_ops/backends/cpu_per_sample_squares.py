"""accumulate_per_sample_squares_ on CPU tensors: torch's BLAS, one tile at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops._schema import register

TILE = 128 * 1024  # elements of one sample's gradient at a time: 512 KiB stay in L2


@register("accumulate_per_sample_squares_", "CPU")
def accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    _schema.check_accumulate_per_sample_squares_(
        square_sums, grad_output, input, offsets, sums, scales
    )
    _schema.check_offsets(offsets, grad_output.shape[0], scales)
    check_finite(grad_output, input)
    rows = max(1, TILE // max(1, input.shape[1]))
    bounds = list(itertools.pairwise(offsets.tolist()))
    factors = [1.0] * len(bounds) if scales is None else scales.tolist()
    wide = input.detach().float()
    with torch.no_grad():
        for first in range(0, grad_output.shape[1], rows):
            part = grad_output.detach()[:, first : first + rows].float()
            for (begin, end), factor in zip(bounds, factors, strict=True):
                tile = part[begin:end].T @ wide[begin:end]
                tile *= factor
                if square_sums is not None:
                    square_sums[first : first + rows].addcmul_(tile, tile)
                if sums is not None:
                    sums[first : first + rows].add_(tile)
    _schema.bump_versions([t for t in (square_sums, sums) if t is not None])


def check_finite(grad_output: Tensor, input: Tensor) -> None:
    """Refuse NaN and infinities, naming the argument and their count; nothing is added then."""
    for name, tensor in (("grad_output", grad_output), ("input", input)):
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(
                f"piece_ops.accumulate_per_sample_squares_: {name} must be finite, got {bad} NaN "
                f"or infinite of {tensor.numel()}; nothing was added"
            )
