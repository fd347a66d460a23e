"""sampled_weight_grad: schema, checker, fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from piece_ops._schema.checks import HALVES_AND_FLOAT, check_dtype, check_indices, check_same_device
from piece_ops._schema.library import LIBRARY, register_fake

LIBRARY.define("sampled_weight_grad(Tensor grad_output, Tensor input, Tensor indices) -> Tensor")


def check_sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> None:
    """Two matrices with a row for each token, rows of consecutive elements, any row stride."""
    op = "sampled_weight_grad"
    for argument, matrix in (("grad_output", grad_output), ("input", input)):
        check_dtype(op, argument, matrix, HALVES_AND_FLOAT)
        if matrix.dim() != 2:
            raise ValueError(
                f"piece_ops.{op}: {argument} must be a matrix [tokens, features], got shape "
                f"{tuple(matrix.shape)}"
            )
        if not matrix.is_contiguous():
            _check_rows(op, argument, matrix)
    if grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"piece_ops.{op}: input must have {grad_output.shape[0]} tokens like grad_output, got "
            f"{input.shape[0]}"
        )
    check_indices(op, (indices,))
    if not grad_output.device == input.device == indices.device:
        check_same_device(op, (grad_output, input, indices))


def _check_rows(op: str, argument: str, matrix: Tensor) -> None:
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    is_consecutive = columns <= 1 or column_stride == 1
    if not is_consecutive or (rows > 1 and row_stride < columns):
        raise ValueError(
            f"piece_ops.{op}: {argument} must have rows of consecutive elements that do not "
            f"overlap, got shape {(rows, columns)} with strides {(row_stride, column_stride)}; "
            "call .contiguous() first if a copy is meant"
        )


@register_fake("sampled_weight_grad")
def _fake_sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    check_sampled_weight_grad(grad_output, input, indices)
    return grad_output.new_empty([indices.numel()], dtype=torch.float32)
