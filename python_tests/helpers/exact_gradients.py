"""Weight gradients of linear layers and embeddings in float64, from what a dense run computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from piece_ops import _taps


def general_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models wrapped from now on gather from dense gradients, whatever their modules are."""
    monkeypatch.setattr(_taps, "kind_of", lambda base: None)


@dataclass
class Exact:
    """A dense gradient, flat: the sum, the sum of the terms' sizes, and how many there were."""

    value: Tensor
    size: Tensor
    terms: int

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value, self.size + other.size, self.terms + other.terms)


def exact_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Exact]:
    """Of every parameter of a Linear, Conv1D or Embedding, by name; the model is not wrapped.

    ``loss()`` runs the model. The products are of X and G as the layers saw them, bit for bit, so
    the difference to a sampled gradient is the rounding of its own sums.
    """
    first_name = {id(p): name for name, p in model.named_parameters()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, inputs: Any, kwargs: Any, output: Tensor) -> None:
        x = (*inputs, *kwargs.values())[0].detach().clone()
        output.register_hook(lambda g: calls.append((module, x, g.detach().clone())))

    hooks = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
    ]
    loss().backward()
    for handle in hooks:
        handle.remove()
    found: dict[str, Exact] = {}
    for module, x, g in calls:
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in first_name:
                name = first_name[id(parameter)]
                exact = _of(module, attribute, x, g)
                found[name] = found[name] + exact if name in found else exact
    model.zero_grad()
    return found


def _of(module: nn.Module, attribute: str, x: Tensor, g: Tensor) -> Exact:
    left = g.reshape(-1, g.shape[-1]).double()
    if attribute == "bias":
        right = torch.ones(len(left), 1, dtype=torch.float64)
    elif isinstance(module, nn.Embedding):
        ids = x.flatten()
        right = torch.nn.functional.one_hot(ids, module.num_embeddings).double()
        if module.padding_idx is not None:
            right[ids == module.padding_idx] = 0.0
    else:
        right = x.reshape(-1, x.shape[-1]).to(g.dtype).double()  # under autocast: as it was cast
    if isinstance(module, nn.Linear) and attribute == "weight":
        left, right = right, left
    return Exact((right.t() @ left).flatten(), (right.t().abs() @ left.abs()).flatten(), len(left))
