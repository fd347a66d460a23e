"""total: schema, checker, fake kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piece_ops._schema.checks import FLOATS, check_same_device, check_tensors
from piece_ops._schema.library import LIBRARY, register_fake

LIBRARY.define("total(Tensor[] tensors) -> Tensor")


def check_total(tensors: Sequence[Tensor]) -> None:
    """Any of the four float types."""
    check_tensors("total", "tensors", tensors, FLOATS)
    check_same_device("total", tensors)


@register_fake("total")
def _fake_total(tensors: list[Tensor]) -> Tensor:
    check_total(tensors)
    return tensors[0].new_empty([], dtype=torch.float64)
