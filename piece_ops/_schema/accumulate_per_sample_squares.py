"""accumulate_per_sample_squares_: schema, checker, fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from piece_ops._schema.checks import HALVES_AND_FLOAT, check_dtype, check_same_device
from piece_ops._schema.library import LIBRARY, register_fake

LIBRARY.define(
    "accumulate_per_sample_squares_(Tensor(a!)? square_sums, Tensor grad_output, Tensor input, "
    "Tensor offsets, Tensor(b!)? sums=None, Tensor? scales=None) -> ()"
)


def check_accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """All but the values of offsets and scales: see check_offsets."""
    op = "accumulate_per_sample_squares_"
    factors = {"grad_output": grad_output, "input": input}
    accumulators = {
        name: tensor
        for name, tensor in (("square_sums", square_sums), ("sums", sums))
        if tensor is not None
    }
    if not accumulators:
        raise ValueError(f"piece_ops.{op}: square_sums or sums must be given, got neither")
    for name, factor in factors.items():
        check_dtype(op, name, factor, HALVES_AND_FLOAT)
        if factor.dim() != 2:
            raise ValueError(
                f"piece_ops.{op}: {name} must be [tokens, features], got shape "
                f"{tuple(factor.shape)}"
            )
        if factor.stride(1) != 1 and factor.shape[1] > 1 and factor.numel():
            raise ValueError(
                f"piece_ops.{op}: {name} must be contiguous in its last dimension, got strides "
                f"{factor.stride()}; call .contiguous() first if a copy is meant"
            )
    if grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"piece_ops.{op}: input must have {grad_output.shape[0]} tokens like grad_output, "
            f"got {input.shape[0]}"
        )
    shape = (grad_output.shape[1], input.shape[1])
    for name, accumulator in accumulators.items():
        check_dtype(op, name, accumulator, (torch.float32,))
        if tuple(accumulator.shape) != shape:
            raise ValueError(
                f"piece_ops.{op}: {name} must have shape {shape}, the features of grad_output and "
                f"of input, got {tuple(accumulator.shape)}"
            )
        if not accumulator.is_contiguous():
            raise ValueError(
                f"piece_ops.{op}: {name} must be contiguous, got strides {accumulator.stride()}"
            )
    check_same_device(op, [*accumulators.values(), *factors.values()])
    check_dtype(op, "offsets", offsets, (torch.int64,))
    if offsets.dim() != 1 or not offsets.numel():
        raise ValueError(
            f"piece_ops.{op}: offsets must be 1-D with one number more than there are samples, "
            f"got shape {tuple(offsets.shape)}"
        )
    on_host = {"offsets": offsets}
    if scales is not None:
        check_dtype(op, "scales", scales, (torch.float32,))
        if tuple(scales.shape) != (offsets.numel() - 1,):
            raise ValueError(
                f"piece_ops.{op}: scales must have shape ({offsets.numel() - 1},), one number a "
                f"sample, got {tuple(scales.shape)}"
            )
        on_host["scales"] = scales
    for name, tensor in on_host.items():
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(f"piece_ops.{op}: {name} must be on the CPU, got {tensor.device}")


def check_offsets(offsets: Tensor, tokens: int, scales: Tensor | None) -> None:
    """Check that samples follow one another and cover all tokens, and that scales are finite."""
    where = "piece_ops.accumulate_per_sample_squares_"
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != tokens:
        raise ValueError(
            f"{where}: offsets must begin with 0 and end with {tokens} (the number of tokens), "
            f"got {first} and {last}"
        )
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if falls.numel():
        n = int(falls[0])
        raise ValueError(
            f"{where}: offsets must not decrease, got {int(offsets[n + 1])} after "
            f"{int(offsets[n])} at position {n + 1}"
        )
    if scales is not None and not bool(scales.isfinite().all()):
        n = int((~scales.isfinite()).nonzero()[0])
        raise ValueError(f"{where}: scales must be finite, got {float(scales[n])} for sample {n}")


def raise_for_nonfinite_factor(grad_output: Tensor, input: Tensor, which: int, count: int) -> None:
    """What a backend found: which 0 is grad_output, 1 input, negative: all is finite."""
    if which >= 0:
        name, factor = (("grad_output", grad_output), ("input", input))[which]
        raise ValueError(
            f"piece_ops.accumulate_per_sample_squares_: {name} must be finite, got {count} NaN or "
            f"infinite of {factor.numel()}; nothing was added"
        )


@register_fake("accumulate_per_sample_squares_")
def _fake_accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    check_accumulate_per_sample_squares_(square_sums, grad_output, input, offsets, sums, scales)
