"""Values' gradients on every model family: those of the whole model in float64, on every route."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piece_ops import PieceModel, Selection

from helpers.exact_gradients import general_route
from helpers.model_zoo import ZOO
from helpers.per_sample import true_gradients
from helpers.tiny_models import random_positions
from helpers.tolerances import PER_SAMPLE_GRADIENT


@pytest.mark.parametrize("is_sampled", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_every_value_gets_its_entry_of_the_float64_gradient(
    name: str, is_sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, convolutions, fused experts and tables included: nothing is left out."""
    if not is_sampled:
        general_route(monkeypatch)
    make, data = ZOO[name]
    model, given = make(), data(seed=1)
    truth = {n: grads[0].flatten() for n, grads in true_gradients(model, [given]).items()}
    error = PER_SAMPLE_GRADIENT * float(torch.stack([g.abs().max() for g in truth.values()]).max())
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    positions = random_positions(model, 0.2)
    total = sum(p.numel() for p in model.parameters())
    wrapped = PieceModel(copy.deepcopy(model), Selection(positions, shapes, total))
    wrapped(**given).loss.backward()
    values = dict(wrapped.values.named_parameters())
    assert values.keys() == truth.keys()
    moved = 0
    for parameter, value in values.items():
        want = truth[parameter][positions[parameter]]
        if value.grad is None:  # a part that the loss does not depend on
            assert not want.any(), parameter
            continue
        assert float((value.grad.double() - want).abs().max()) <= error, parameter
        moved += bool(want.any())
    assert moved > 0.7 * len(values)


class Mixed(nn.Module):
    """Layers that are tapped, and one for each reason why not."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.normed = nn.Embedding(5, 4), nn.Embedding(5, 4, max_norm=0.5)
        self.plain, self.hooked, self.after = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.tied = nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.after(self.hooked(self.plain(self.table(ids) + self.normed(ids))))
        return self.tied(self.norm(x)).square().sum()


def replace_forward(module: Any) -> None:
    """As accelerate's hooks do."""
    old = module.forward
    module.forward = lambda x: old(x)


def test_dense_gradients_are_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are made in a backward, and no others."""
    model = Mixed()
    replace_forward(model.hooked)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    positions = random_positions(model, 0.5)
    wrapped = PieceModel(model, Selection(positions, shapes, 200))
    replace_forward(model.after)  # of the tapped forward
    made: set[int] = set()
    real = torch.take

    def take(grad: Tensor, indices: Tensor) -> Tensor:
        made.add(id(indices))
        return real(grad, indices)

    monkeypatch.setattr(torch, "take", take)
    wrapped(torch.tensor([[0, 3, 3], [1, 2, 4]])).backward()
    found = {target.name for target in wrapped._targets if id(target.indices) in made}
    listed = wrapped.dense_gradients
    assert listed.keys() == found
    assert found == {"normed.weight", "hooked.weight", "hooked.bias", "norm.weight", "norm.bias"}
    assert "max_norm" in listed["normed.weight"] and "replaced" in listed["hooked.bias"]
    assert listed["norm.bias"].startswith("LayerNorm ")
