"""Tensors as the extension takes them: addresses, element counts, dtype codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from piece_ops import _schema


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """``data_ptr()`` of each."""
    return list(map(Tensor.data_ptr, tensors))


def sizes(tensors: Iterable[Tensor]) -> list[int]:
    """``numel()`` of each."""
    return list(map(Tensor.numel, tensors))


def dtypes(tensors: Sequence[Tensor]) -> list[int]:
    """One code for all where they agree: a list of 10,000 costs its conversion."""
    each = list(map(_schema.dtype_of, tensors))
    distinct = each[:1] if len(set(each)) == 1 else each
    return [_schema.DTYPE_CODES[dtype] for dtype in distinct]


def matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address, elements from row to row, columns, dtype code."""
    code = _schema.DTYPE_CODES[tensor.dtype]
    return tensor.data_ptr(), tensor.stride(0), tensor.shape[1], code
