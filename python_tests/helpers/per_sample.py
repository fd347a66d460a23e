"""Per-sample gradients in float64, one sample after another, and comparisons with accumulators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops.importance import Importance

from helpers.compare import assert_within

Loss = Callable[[nn.Module, Any], Tensor]


def rows_of(batch: Any) -> list[Any]:
    """The rows of a dict or list of tensors as batches of one."""
    if isinstance(batch, dict):
        count = len(next(iter(batch.values())))
        return [{key: value[n : n + 1] for key, value in batch.items()} for n in range(count)]
    return [[tensor[n : n + 1] for tensor in batch] for n in range(len(batch[0]))]


def to_float64(batch: Any) -> Any:
    """Floating-point tensors widened."""
    if isinstance(batch, dict):
        return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]


def true_gradients(
    model: nn.Module, samples: list[Any], loss_fn: Loss | None = None
) -> dict[str, Tensor]:
    """Every sample's gradient of every parameter, [samples, ...], from a float64 copy."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # the grouped product knows no float64
    loss_of = loss_fn or (lambda m, b: m(**b).loss)
    found: dict[str, list[Tensor]] = {name: [] for name, _ in wide.named_parameters()}
    for sample in samples:
        wide.zero_grad()
        loss_of(wide, to_float64(sample)).backward()
        for name, parameter in wide.named_parameters():
            grad = parameter.grad
            found[name].append(torch.zeros_like(parameter) if grad is None else grad.to_dense())
    return {name: torch.stack(grads).detach() for name, grads in found.items()}


def assert_true_sums(importance: Importance, truth: dict[str, Tensor], rounding: float) -> None:
    """Sums and square sums are those of `truth`.

    Each element of a sample's gradient may be off by `rounding` times the largest element of that
    sample's gradients: errors come down through the layers, so small gradients inherit large ones'.
    """
    largest = torch.stack([grads.flatten(1).abs().amax(1) for grads in truth.values()]).amax(0)
    for name in importance.names:
        grads = truth[name]
        error = (rounding * largest).reshape(-1, *[1] * (grads.dim() - 1))
        if importance._sums:
            bound = error.sum().expand(grads.shape[1:])
            assert_within(importance._sums[name], grads.sum(0), bound, f"sums of {name}")
        if importance._square_sums:
            bound = ((2.0 * grads.abs() + error) * error).sum(0)
            got = importance._square_sums[name]
            assert_within(got, grads.square().sum(0), bound, f"square sums of {name}")


def clear_k(importance: Importance, near: int) -> int:
    """A number of coordinates near `near` whose last one leads the next by more than rounding."""
    scores = torch.cat([importance._square_sums[name].flatten() for name in importance.names])
    ordered = scores.topk(min(2 * near, scores.numel())).values
    leads = (ordered[:-1] - ordered[1:]) / ordered[:-1].clamp_min(1e-30)
    return int(leads[near // 2 :].argmax()) + near // 2 + 1
