"""gather: schema, checker, fake kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piece_ops._schema.checks import (
    FLOATS,
    check_indices,
    check_same_count,
    check_same_device,
    check_tensors,
    dtype_of,
    name_dtypes,
)
from piece_ops._schema.library import LIBRARY, register_fake

LIBRARY.define("gather(Tensor[] sources, Tensor[] indices, ScalarType? dtype=None) -> Tensor[]")


def check_gather(
    sources: Sequence[Tensor], indices: Sequence[Tensor], dtype: torch.dtype | None = None
) -> None:
    """dtype: None (the source's own) or float32."""
    op = "gather"
    check_same_count(op, len(sources), indices=indices)
    check_tensors(op, "sources", sources, FLOATS)
    check_indices(op, indices)
    check_same_device(op, sources, indices)
    if dtype is None:
        return
    if dtype != torch.float32:
        raise TypeError(
            f"piece_ops.{op}: dtype must be None (the source's own) or float32, got "
            f"{name_dtypes([dtype])}"
        )
    if torch.float64 in set(map(dtype_of, sources)):
        raise TypeError(f"piece_ops.{op}: float64 sources cannot be gathered into float32")


@register_fake("gather")
def _fake_gather(
    sources: list[Tensor], indices: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    check_gather(sources, indices, dtype)
    return new_values(sources, indices, dtype)


def new_values(
    sources: Sequence[Tensor], indices: Sequence[Tensor], dtype: torch.dtype | None
) -> list[Tensor]:
    """Allocate what gather returns."""
    return [
        source.new_empty([index.numel()], dtype=dtype or source.dtype)
        for source, index in zip(sources, indices, strict=True)
    ]
