"""sparse_adamw_: schema, checker, fake kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piece_ops._schema.checks import (
    HALVES_AND_FLOAT,
    check_indices,
    check_same_count,
    check_same_device,
    check_same_numel,
    check_tensors,
)
from piece_ops._schema.library import LIBRARY, register_fake

LIBRARY.define(
    "sparse_adamw_(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] values, Tensor[] grads, "
    "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, int step, float lr, float beta1, "
    "float beta2, float eps, float weight_decay) -> ()"
)


def check_sparse_adamw_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """grads[t] has as many elements as indices[t] (compact) or as weights[t] (dense)."""
    op = "sparse_adamw_"
    count = len(weights)
    check_same_count(op, count, indices=indices, values=values, grads=grads)
    check_same_count(op, count, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    check_tensors(op, "weights", weights, HALVES_AND_FLOAT)
    check_indices(op, indices)
    check_tensors(op, "grads", grads, HALVES_AND_FLOAT)
    for argument, tensors in (
        ("values", values),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
    ):
        check_tensors(op, argument, tensors, (torch.float32,))
        check_same_numel(op, argument, tensors, "indices", indices)
    sizes = zip(*(map(Tensor.numel, tensors) for tensors in (grads, indices, weights)), strict=True)
    for t, (got, selected, dense) in enumerate(sizes):
        if got != selected and got != dense:
            raise ValueError(
                f"piece_ops.{op}: grads[{t}] must have {selected} elements (one a selected "
                f"weight) or {dense} (dense), got {got}"
            )
    check_same_device(op, weights, indices, values, grads, exp_avgs, exp_avg_sqs)
    check_adamw_numbers(step, lr, beta1, beta2, eps, weight_decay)


def check_adamw_numbers(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    op = "sparse_adamw_"
    for argument, number, fits, wanted in (
        ("step", step, step >= 1, "at least 1"),
        ("lr", lr, 0 <= lr < float("inf"), "finite and not negative"),
        ("beta1", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("eps", eps, 0 <= eps < float("inf"), "finite and not negative"),
        ("weight_decay", weight_decay, 0 <= weight_decay < float("inf"), "not negative"),
    ):
        if not fits:
            raise ValueError(f"piece_ops.{op}: {argument} must be {wanted}, got {number}")


@register_fake("sparse_adamw_")
def _fake_sparse_adamw_(*args: Any) -> None:
    check_sparse_adamw_(*args)
