"""SparseAdamW: equal to torch.optim.AdamW, at home in torch's training tools."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piece_ops.optim as optim_module
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection

from helpers.tiny_models import batch, gpt2, llama, random_positions


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """These models are too small to share; a second thread only waits."""
    torch.set_num_threads(1)


def wrap(model: Any, density: float = 0.05) -> PieceModel:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    return PieceModel(model, Selection(random_positions(model, density), shapes, total))


def values_of(model: PieceModel) -> dict[str, nn.Parameter]:
    return dict(model.values.named_parameters())


def train(model: Any, optimizer: Any, steps: int, *, first: int = 0, clip: float = 0.0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(**batch(3, 7, seed=step)).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()


# ------------------------------------------------------------------------ against torch.optim.AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_a_hundred_steps_with_everything_selected_equal_adamw(
    make: Any, weight_decay: float
) -> None:
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": weight_decay}
    dense, start = make(), make()
    wrapped = wrap(make(), density=1.0)
    assert sum(v.numel() for v in wrapped.values.parameters()) == wrapped.selection.total
    train(dense, torch.optim.AdamW(dense.parameters(), **settings), 100)
    train(wrapped, SparseAdamW(wrapped.parameters(), **settings), 100)
    trained = dict(wrapped.unload().named_parameters())
    for (name, wanted), before in zip(dense.named_parameters(), start.parameters(), strict=True):
        # Weights move by some 0.1. eps is large because some gradients are zero but for rounding
        # (a key's bias), and Adam would turn that noise into full steps.
        assert (wanted - before).abs().max() > 0.02
        torch.testing.assert_close(trained[name], wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_adamw_on_the_same_values_and_gradients(dtype: torch.dtype) -> None:
    """Given the same gradients the values agree to a few units in the last place."""
    wrapped = wrap(llama(dtype=dtype))
    values = values_of(wrapped)
    twins = {name: nn.Parameter(value.detach().clone()) for name, value in values.items()}
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    sparse = SparseAdamW(wrapped.parameters(), **settings)
    dense = torch.optim.AdamW(twins.values(), **settings)
    for step in range(100):
        wrapped.zero_grad()
        wrapped(**batch(3, 7, seed=step)).loss.backward()
        for name, value in values.items():
            twins[name].grad = value.grad.clone()
        sparse.step()
        dense.step()
    for name, value in values.items():
        torch.testing.assert_close(value, twins[name], rtol=2e-6, atol=1e-6)
    for target in wrapped._targets:
        assert torch.equal(target.weight.flatten()[target.indices], target.values.to(dtype))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spoils_its_own_coordinate_only(wrong: float) -> None:
    """For good, as in torch: NaN moments stay NaN."""
    layer = nn.Linear(4, 3, bias=False)
    before = layer.weight.detach().clone()
    wrapped = PieceModel(
        layer, Selection({"weight": torch.tensor([1, 5, 9])}, {"weight": (3, 4)}, 12)
    )
    (value,) = wrapped.values.parameters()
    twin = nn.Parameter(value.detach().clone())
    sparse = SparseAdamW(wrapped.parameters(), lr=1e-2)
    dense = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.0)
    for gradient in ([1.0, wrong, -2.0], [1.0, 1.0, -2.0]):
        value.grad, twin.grad = torch.tensor(gradient), torch.tensor(gradient)
        sparse.step()
        dense.step()
        torch.testing.assert_close(value, twin, equal_nan=True)
    weight = layer._parameters["weight"].detach().flatten()
    assert weight.isnan().nonzero().flatten().tolist() == [5]
    others = torch.tensor([0, 2, 3, 4, 6, 7, 8, 10, 11])
    assert torch.equal(weight[others], before.flatten()[others])


def test_parameters_with_other_step_counts_are_updated_with_their_own() -> None:
    wrapped = wrap(llama())
    values = values_of(wrapped)
    twins = {name: nn.Parameter(value.detach().clone()) for name, value in values.items()}
    sparse, dense = SparseAdamW(wrapped.parameters()), torch.optim.AdamW(twins.values(), lr=1e-4)
    dense.param_groups[0]["weight_decay"] = 0.0
    for step in range(6):
        for number, (name, value) in enumerate(values.items()):
            gradient = torch.randn(value.shape) if number % (step + 1) == 0 else None
            value.grad = gradient
            twins[name].grad = None if gradient is None else gradient.clone()
        sparse.step()
        dense.step()
    assert len({sparse.state[value]["step"] for value in values.values()}) > 3
    for name, value in values.items():
        torch.testing.assert_close(value, twins[name], rtol=1e-6, atol=1e-7)


def test_one_call_per_step_and_no_second_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = wrap(llama())
    calls: list[int] = []
    real = optim_module.sparse_adamw_

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(len(args[0]))
        real(*args, **kwargs)

    monkeypatch.setattr(optim_module, "sparse_adamw_", counted)
    train(wrapped, SparseAdamW(wrapped.parameters()), 3)
    assert calls == [len(wrapped._targets)] * 3
    assert wrapped.sync_() == 0


# ------------------------------------------------------------------------------------ torch's tools


def test_state_is_two_floats_per_value_and_survives_its_dict_bit_for_bit() -> None:
    def start() -> tuple[PieceModel, SparseAdamW]:
        wrapped = wrap(llama(dtype=torch.bfloat16))
        return wrapped, SparseAdamW(wrapped.parameters(), lr=1e-2)

    whole, whole_optimizer = start()
    train(whole, whole_optimizer, 6)
    half, half_optimizer = start()
    train(half, half_optimizer, 3)
    state = half_optimizer.state_dict()
    kept = copy.deepcopy(state)
    resumed, resumed_optimizer = start()
    resumed.load_state_dict(half.state_dict())
    resumed_optimizer.load_state_dict(state)
    train(resumed, resumed_optimizer, 3, first=3)
    for name, value in values_of(whole).items():
        assert torch.equal(value, values_of(resumed)[name])
        moments = resumed_optimizer.state[values_of(resumed)[name]]
        wanted = whole_optimizer.state[value]
        assert moments["step"] == wanted["step"] == 6
        for key in ("exp_avg", "exp_avg_sq"):
            assert moments[key].dtype == torch.float32 and moments[key].shape == value.shape
            assert torch.equal(moments[key], wanted[key])
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, dict(resumed.model.named_parameters())[name])
    for number, held in kept["state"].items():  # not written through the loaded dict
        assert torch.equal(held["exp_avg"], state["state"][number]["exp_avg"])


def test_clipping_takes_the_norm_of_the_values_only() -> None:
    wrapped = wrap(llama())
    wrapped(**batch()).loss.backward()
    gradients = torch.cat([v.grad for v in wrapped.values.parameters()])
    norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.1)
    torch.testing.assert_close(norm, gradients.norm())
    clipped = torch.cat([v.grad for v in wrapped.values.parameters()])
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.1))
    train(wrapped, SparseAdamW(wrapped.parameters()), 2, clip=1.0)


def test_schedulers_and_parameter_groups() -> None:
    wrapped = wrap(llama())
    values = list(wrapped.values.parameters())
    optimizer = SparseAdamW([{"params": values[:3], "lr": 1.0}, {"params": values[3:6]}], lr=0.5)
    optimizer.add_param_group({"params": values[6], "lr": 0.0, "weight_decay": 0.0})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [value.detach().clone() for value in values]
    for value in values:
        value.grad = torch.ones_like(value)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    moved = [
        float((old - value.detach()).abs().max()) for old, value in zip(before, values, strict=True)
    ]
    assert moved[0] == pytest.approx(1.5, rel=1e-4) and moved[4] == pytest.approx(0.75, rel=1e-4)
    assert moved[6] == 0.0 and moved[8] == 0.0
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_closure_and_frozen_values() -> None:
    wrapped = wrap(llama())
    values = values_of(wrapped)
    frozen = values["model.norm.weight"].requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = wrapped(**batch()).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert torch.equal(frozen, before) and frozen not in optimizer.state


def test_named_parameters_and_dense_parameters_are_sorted_out() -> None:
    wrapped = wrap(llama())
    wanted = set(map(id, wrapped.values.parameters()))
    for given in (wrapped.parameters(), wrapped.named_parameters(), wrapped.values.parameters()):
        groups = SparseAdamW(given).param_groups
        assert {id(p) for group in groups for p in group["params"]} == wanted


# ---------------------------------------------------------------------------------------- bad input


def test_ordinary_parameters_are_refused() -> None:
    model = llama()
    with pytest.raises(TypeError, match="values of a PieceModel, got an ordinary Parameter"):
        SparseAdamW(model.parameters())
    wrapped = wrap(model)
    optimizer = SparseAdamW(wrapped.parameters())
    with pytest.raises(TypeError, match="wrap the model with PieceModel"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="got none among 1 parameters"):
        SparseAdamW([nn.Parameter(torch.zeros(2), requires_grad=False)])
    values = list(wrapped.values.parameters())
    assert len(SparseAdamW([{"params": values}, {"params": []}]).param_groups) == 2
    with pytest.raises(ValueError, match="got none in 1 groups"):
        SparseAdamW([{"params": []}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"lr": float("nan")}, "lr must not be negative, got nan"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAdamW(wrap(llama()).parameters(), **settings)


def test_values_of_an_unloaded_model_are_refused() -> None:
    wrapped = wrap(llama())
    optimizer = SparseAdamW(wrapped.parameters())
    wrapped(**batch()).loss.backward()
    wrapped.unload()
    with pytest.raises(RuntimeError, match="a PieceModel that has been unloaded"):
        optimizer.step()
