"""Values' gradients on every model family: those of the whole model in float64, on every route."""

from __future__ import annotations

import copy

import pytest
import torch

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
