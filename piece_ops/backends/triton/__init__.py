"""The Triton kernels (tensor-core work), as the CUDA backend of their ops.

Triton is imported by the first call: it is optional, and CPU users never wait for it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from piece_ops._schema import register


def kernels(op: str) -> ModuleType:
    """The module of an op (its name without the underscore), or an error that says what to get."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"piece_ops.{op}: CUDA tensors need triton, got none ({error}); "
            "pip install 'piece_ops[triton]'"
        ) from error
    return importlib.import_module(f"{__name__}.{op.rstrip('_')}")


def accumulate_finite(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None,
    scales: Tensor | None,
    maxima: tuple[Tensor, str, float] | None = None,
) -> bool:
    """The op on CUDA tensors whose caller looks for NaN and infinity, so that nothing waits.

    `maxima`: where the largest score of every 32 elements goes, its kind and constant. Returns
    whether they were written: a chunk must lie in one row, and the kind must need no more.
    """
    op = "accumulate_per_sample_squares_"
    module = kernels(op)
    wanted = None
    if maxima is not None and maxima[1] in module.MAXIMA_OF and input.shape[1] % 32 == 0:
        wanted = module.Maxima(*maxima)
    with torch.cuda.device(grad_output.device):
        module.accumulate_per_sample_squares_(
            square_sums, grad_output, input, offsets, sums, scales, None, wanted, is_finite=True
        )
    return wanted is not None and len(offsets) > 1


@register("accumulate_per_sample_squares_", "CUDA")
def accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    op = "accumulate_per_sample_squares_"
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"piece_ops.{op}: must not be captured by a CUDA graph, got a capture")
    with torch.cuda.device(grad_output.device):
        kernels(op).accumulate_per_sample_squares_(
            square_sums, grad_output, input, offsets, sums, scales
        )
