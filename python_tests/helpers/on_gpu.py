"""Run the CUDA ops on CPU tensors by moving them to the GPU and back.

As a pytest plugin (``-p helpers.on_gpu``): every contract test of an op then checks the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ops.backends import triton

from helpers.emulated import compute_no_row_whole, cuda_implementations

DEVICE = "cuda"


@dataclass
class Place:
    """Where ops run. `sleep`: cycles for which the stream is busy before their input is there."""

    device: str = DEVICE
    sleep: int = 0


place = Place()


def moved(x: Tensor, there: Tensor) -> Tensor:
    """A copy on the GPU that starts as far from a 16-byte boundary as the original may do."""
    if not x.is_contiguous():
        strided = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=place.device)
        # Elements that share memory every op refuses, so there only the layout matters.
        overlaps = torch._debug_has_internal_overlap(strided) == 1
        return strided if overlaps else strided.copy_(there)
    offset = x.storage_offset() % 8
    whole = torch.empty(x.numel() + offset, dtype=x.dtype, device=place.device)
    return whole[offset:].view(x.shape).copy_(there)


def each(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to a tensor, or to those of a list or tuple; other things as they are."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)(each(part, change) for part in x)
    return x


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same op over CPU tensors; what it writes on the GPU is copied back."""

    def run(*arguments: Any) -> Any:
        given = [a for a in arguments]
        # Brought over first, which waits; then copied there, as the stream gets to it.
        brought: list[Tensor] = []
        each(given, lambda x: brought.append(x.detach().to(place.device)) or x)
        if place.sleep:
            torch.cuda._sleep(place.sleep)
        parts = iter(brought)
        there = each(given, lambda x: moved(x, next(parts)))
        result = function(*there)
        for argument, copy in zip(given, there, strict=True):
            pairs = (
                (argument, copy) if isinstance(argument, (list, tuple)) else ([argument], [copy])
            )
            for x, y in zip(*pairs, strict=True):
                # Written is what torch's counter says: moved() itself counted once.
                if isinstance(x, Tensor) and y is not x and y._version > 1:
                    with torch.no_grad():
                        x.copy_(y)
        return each(result, lambda x: x.cpu())

    return run


def gpu_implementations() -> dict[str, Callable[..., Any]]:
    return {op: on_gpu(function) for op, function in cuda_implementations().items()}


def per_sample_squares(*given: Any) -> None:
    """The op on the GPU: offsets and scales stay where they are, on the host."""
    squares, grad, x, offsets, *rest = given
    sums, scales = (*rest, None, None)[:2]

    def run(*there: Any) -> None:
        triton.accumulate_per_sample_squares_(*there[:3], offsets, there[3], scales)

    on_gpu(run)(squares, grad, x, sums)


_kept: list[Any] = []


def pytest_configure(config: Any) -> None:
    library = torch.library.Library("piece_ops", "IMPL")
    implementations = gpu_implementations()
    implementations["accumulate_per_sample_squares_"] = per_sample_squares
    for op, function in implementations.items():
        library.impl(op, function, "CPU", allow_override=True)
    compute_no_row_whole()
    _kept.append(library)
