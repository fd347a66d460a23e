"""What the checkers of several ops ask, and how they say it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*HALVES_AND_FLOAT, torch.float64)
# The numbers of csrc/include/piece_ops/core/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

dtype_of = attrgetter("dtype")
_device_of = attrgetter("device")
_is_cuda = attrgetter("is_cuda")


def name_dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Check the dtype of one tensor."""
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"piece_ops.{op}: {name} must be {name_dtypes(dtypes)}, "
            f"got {name_dtypes([tensor.dtype])}"
        )


def check_tensors(
    op: str, argument: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> set[torch.dtype]:
    """Check dtype and contiguity of one list; its dtypes. The right case costs 0.1 us a tensor."""
    found = set(map(dtype_of, tensors))
    if not found <= set(dtypes):
        for t, tensor in enumerate(tensors):
            if tensor.dtype not in dtypes:
                raise TypeError(
                    f"piece_ops.{op}: {argument}[{t}] must be {name_dtypes(dtypes)}, "
                    f"got {name_dtypes([tensor.dtype])}"
                )
    if not all(map(Tensor.is_contiguous, tensors)):
        t = next(t for t, tensor in enumerate(tensors) if not tensor.is_contiguous())
        raise ValueError(
            f"piece_ops.{op}: {argument}[{t}] must be contiguous, got shape "
            f"{tuple(tensors[t].shape)} with strides {tensors[t].stride()}; "
            "call .contiguous() first if a copy is meant"
        )
    return found


def check_same_count(op: str, count: int, **lists: Sequence[Any]) -> None:
    """Check that every list has ``count`` entries."""
    for argument, tensors in lists.items():
        if len(tensors) != count:
            raise ValueError(
                f"piece_ops.{op}: {argument} must have {count} tensors, got {len(tensors)}"
            )


def check_same_numel(
    op: str, argument: str, tensors: Sequence[Tensor], like: str, others: Sequence[Tensor]
) -> None:
    """Check that tensors have pairwise as many elements as others."""
    if list(map(Tensor.numel, tensors)) == list(map(Tensor.numel, others)):
        return
    for t, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        if tensor.numel() != other.numel():
            raise ValueError(
                f"piece_ops.{op}: {argument}[{t}] must have {other.numel()} elements like "
                f"{like}[{t}], got {tensor.numel()} (shape {tuple(tensor.shape)})"
            )


def check_same_device(op: str, *lists: Sequence[Tensor]) -> None:
    """Check that all tensors of all lists are on one device."""
    every = list(chain.from_iterable(lists))
    if all(map(_is_cuda, every)) and len(set(map(Tensor.get_device, every))) <= 1:
        return  # without an object for each device: at half the cost
    devices = set(map(_device_of, every))
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"piece_ops.{op}: all tensors must be on one device, got {names}")


def check_indices(op: str, indices: Sequence[Tensor], argument: str = "indices") -> None:
    check_tensors(op, argument, indices, (torch.int64,))
    if set(map(Tensor.dim, indices)) <= {1}:
        return
    for t, index in enumerate(indices):
        if index.dim() != 1:
            raise ValueError(
                f"piece_ops.{op}: {argument}[{t}] must be flat (1-D), got shape "
                f"{tuple(index.shape)}"
            )


def check_name(op: str, argument: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(
            f"piece_ops.{op}: {argument} must be one of {', '.join(known)}, got {value!r}"
        )


def bump_versions(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors were written."""
    for tensors in lists:
        if any(map(Tensor.is_inference, tensors)):  # these count no versions
            tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        torch.autograd.graph.increment_version(tensors)
