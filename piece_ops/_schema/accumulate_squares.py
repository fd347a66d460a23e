"""accumulate_squares_: schema, checker, fake kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piece_ops._schema.checks import (
    HALVES_AND_FLOAT,
    check_same_count,
    check_same_device,
    check_same_numel,
    check_tensors,
)
from piece_ops._schema.library import LIBRARY, register_fake

LIBRARY.define(
    "accumulate_squares_(Tensor(a!)[] square_sums, Tensor[] grads, Tensor(b!)[] sums, "
    "float weight) -> ()"
)


def check_accumulate_squares_(
    square_sums: Sequence[Tensor], grads: Sequence[Tensor], sums: Sequence[Tensor], weight: float
) -> None:
    """square_sums or sums may be empty lists: left out."""
    op = "accumulate_squares_"
    if not square_sums and not sums and grads:
        raise ValueError(f"piece_ops.{op}: square_sums or sums must be given, got neither")
    check_tensors(op, "grads", grads, HALVES_AND_FLOAT)
    for argument, accumulators in (("square_sums", square_sums), ("sums", sums)):
        if accumulators:
            check_same_count(op, len(grads), **{argument: accumulators})
            check_tensors(op, argument, accumulators, (torch.float32,))
            check_same_numel(op, argument, accumulators, "grads", grads)
    check_same_device(op, square_sums, grads, sums)
    check_weight(weight)


def check_weight(weight: float) -> None:
    """Of accumulate_squares_."""
    op = "accumulate_squares_"
    if not 0 < weight < float("inf"):
        raise ValueError(f"piece_ops.{op}: weight must be positive and finite, got {weight}")


@register_fake("accumulate_squares_")
def _fake_accumulate_squares_(
    square_sums: list[Tensor], grads: list[Tensor], sums: list[Tensor], weight: float
) -> None:
    check_accumulate_squares_(square_sums, grads, sums, weight)
