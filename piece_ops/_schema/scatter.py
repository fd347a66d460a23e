"""scatter_: schema, checker, fake kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piece_ops._schema.checks import (
    FLOATS,
    check_indices,
    check_same_count,
    check_same_device,
    check_same_numel,
    check_tensors,
    name_dtypes,
)
from piece_ops._schema.library import LIBRARY, register_fake

LIBRARY.define("scatter_(Tensor(a!)[] targets, Tensor[] indices, Tensor[] values) -> ()")


def check_scatter_(
    targets: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """values[t] is float32, or of targets[t]'s dtype."""
    op = "scatter_"
    check_same_count(op, len(targets), indices=indices, values=values)
    check_tensors(op, "targets", targets, FLOATS)
    check_indices(op, indices)
    check_tensors(op, "values", values, FLOATS)
    check_same_numel(op, "values", values, "indices", indices)
    for t, (target, value) in enumerate(zip(targets, values, strict=True)):
        if value.dtype not in (target.dtype, torch.float32):
            raise TypeError(
                f"piece_ops.{op}: values[{t}] must be {name_dtypes([target.dtype])} like its "
                f"target, or float32, got {name_dtypes([value.dtype])}"
            )
    check_same_device(op, targets, indices, values)


@register_fake("scatter_")
def _fake_scatter_(targets: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    check_scatter_(targets, indices, values)
