"""Sampled gradients, of linear layers and embeddings: those of the dense gradient, entry by entry.

The reference is float64 arithmetic on what a dense run of the same model computed, so a difference
is the rounding of the sampled sums themselves.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from piece_ops._taps import TAP
from piece_ops.model import PieceModel
from piece_ops.selection import Selection

from helpers.exact_gradients import exact_gradients
from helpers.tiny_models import MODELS, batch, llama, random_positions
from helpers.tolerances import sum_of_products

DATA = batch(3, 7, seed=1)
Loss = Callable[[], Tensor]


def select(model: nn.Module, density: float = 0.05, *names: str) -> Selection:
    """Random positions of every parameter, or of those whose name contains one of `names`."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    positions = random_positions(model, density)
    if names:
        positions = {n: p for n, p in positions.items() if any(part in n for part in names)}
    return Selection(positions, shapes, sum(p.numel() for p in model.parameters()))


def values_of(model: PieceModel) -> dict[str, nn.Parameter]:
    return dict(model.values.named_parameters())


def gradients(wrapped: PieceModel, loss: Loss) -> dict[str, Tensor]:
    wrapped.zero_grad()
    loss().backward()
    found = {n: v.grad.clone() for n, v in values_of(wrapped).items() if v.grad is not None}
    wrapped.zero_grad()
    return found


def wrap_and_check(
    model: nn.Module, loss: Loss, chosen: Selection, features: Callable[[], None] | None = None
) -> PieceModel:
    """Wrap the model; forward keeps its bits, every tapped gradient is the dense one's entries."""
    exact = exact_gradients(model, loss)
    plain = loss().detach()
    wrapped = PieceModel(model, chosen)
    if features is not None:
        features()
    assert torch.equal(loss(), plain)
    found = gradients(wrapped, loss)
    assert found.keys() == chosen.indices.keys()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    checked = 0
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if name in exact:
            reference, positions = exact[name], chosen.indices[name]
            error = (gradient.double() - reference.value[positions]).abs()
            bound = sum_of_products(reference.terms) * reference.size[positions]
            assert bool((error <= bound).all()), f"{name}: {error.max()}"
            checked += 1
    assert checked
    return wrapped


# ------------------------------------------------------------------------------- kinds of modules

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "linear without bias": lambda: nn.Linear(6, 5, bias=False),
    "conv1d": lambda: Conv1D(5, 6),
    "subclass": lambda: type("Mine", (nn.Linear,), {})(6, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.04, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 4, 6), (2, 1, 3, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_one_layer(
    layer_name: str, shape: tuple[int, ...], density: float, dtype: torch.dtype
) -> None:
    layer = LAYERS[layer_name]().to(dtype)
    x, c = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 5)
    wrap_and_check(layer, lambda: (layer(x) * c).sum(), select(layer, density))
    assert TAP in layer.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding: int | None, density: float, dtype: torch.dtype) -> None:
    layer = nn.Embedding(9, 4, padding_idx=padding).to(dtype)
    ids = torch.tensor([[1, 2, 2, 8], [0, 8, 2, 5]])  # repeated ids, rows that nobody looks up
    c = torch.randn(2, 4, 4)
    wrapped = wrap_and_check(layer, lambda: (layer(ids) * c).sum(), select(layer, density))
    none = gradients(wrapped, lambda: layer(ids[:0]).sum())
    assert not none["weight"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    torch.set_default_dtype(dtype)
    try:
        wrap_and_check(layer, lambda: layer(x).square().sum(), select(layer, 0.5))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("settings", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_with_a_rule_of_their_own_keep_it(settings: dict[str, Any]) -> None:
    layer, ids = nn.Embedding(9, 4, **settings), torch.tensor([1, 2, 2, 8])
    layer(ids).square().sum().backward()
    dense = layer.weight.grad.flatten()
    layer.zero_grad()
    chosen = select(layer, 0.5)
    found = gradients(PieceModel(layer, chosen), lambda: layer(ids).square().sum())
    assert torch.equal(found["weight"], dense[chosen.indices["weight"]])


@pytest.mark.parametrize("model_name", MODELS)
def test_models(model_name: str) -> None:
    """Tied weights too: the head by its tap, the embedding by another, both add up."""
    model = MODELS[model_name]()
    wrapped = wrap_and_check(model, lambda: model(**DATA).loss, select(model))
    tapped = [m for m in model.modules() if TAP in m.__dict__]
    assert len(tapped) == 1 + 1 + (8 if "gpt2" in model_name else 14) + ("gpt2" in model_name)
    assert wrapped.unload() is model
    assert not any(TAP in m.__dict__ for m in model.modules())


class Packed(nn.Linear):
    """A layer that is Linear by name only, as quantised ones are."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.sign() * self.weight.abs().mean(), self.bias)


class Direct(nn.Module):
    """Weights of linear layers that are read from outside, and through a layer of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.read, self.both, self.packed = nn.Linear(8, 8), nn.Linear(8, 8), Packed(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = F.linear(x, self.read.weight, self.read.bias)
        x = self.both(x).tanh() @ self.both.weight
        return self.normed(self.packed(x)).square().mean()


def test_a_weight_read_from_outside_takes_the_general_route() -> None:
    model, x = Direct(), torch.randn(3, 5, 8)
    model(x).backward()
    dense = {n: p.grad.flatten() for n, p in model.named_parameters()}
    model.zero_grad()
    chosen = select(model, 0.3)
    found = gradients(PieceModel(model, chosen), lambda: model(x))
    assert TAP in model.both.__dict__ and TAP not in model.packed.__dict__
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dense[name][chosen.indices[name]], msg=name)


# --------------------------------------------------------------------------------------- features


def net() -> nn.Sequential:
    """In-place activations, a layer called twice, a transposed layer."""
    torch.manual_seed(0)
    twice = nn.Linear(6, 6)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), twice, nn.Tanh(), twice, Conv1D(3, 6)
    )


X = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))


def test_in_place_activation_and_a_layer_called_twice() -> None:
    model = net()
    wrap_and_check(model, lambda: model(X).square().sum(), select(model, 0.3))


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_autocast(density: float) -> None:
    model = llama()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**DATA).loss

    wrap_and_check(model, loss, select(model, density, "layers.0.mlp", "layers.1"))


def test_module_hooks() -> None:
    model, seen = net(), []

    def add_hooks() -> None:
        model[2].register_forward_pre_hook(lambda m, args: (args[0] * 1.0,))
        model[2].register_forward_hook(lambda m, args, out: out * 1.0)
        model[2].register_full_backward_pre_hook(lambda m, g: seen.append(g[0].shape))
        model[2].register_full_backward_hook(lambda m, g, out: seen.append(g[0].shape))

    loss: Loss = lambda: model(X).square().sum()  # noqa: E731
    wrap_and_check(model, loss, select(model, 0.3), add_hooks)
    assert seen == [(5, 2, 6)] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model, x = net(), X.clone().requires_grad_()
    wrapped = PieceModel(model, select(model, 0.1))
    plain = gradients(wrapped, lambda: model(x).square().sum())
    again = gradients(wrapped, lambda: checkpoint(model, x, use_reentrant=reentrant).square().sum())
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_micro_batches_add_up_in_float32() -> None:
    model = net().to(torch.bfloat16)
    wrapped = PieceModel(model, select(model, 0.3))
    parts = [X[i : i + 1].to(torch.bfloat16) for i in range(5)]
    single = [gradients(wrapped, lambda p=p: model(p).square().sum()) for p in parts]
    for part in parts:
        model(part).square().sum().backward()
    for name, values in values_of(wrapped).items():
        expected = single[0][name]
        for found in single[1:]:
            expected = expected + found[name]
        assert torch.equal(values.grad, expected)


def test_frozen_values_cost_nothing_and_change_nothing() -> None:
    model = net()
    wrapped = PieceModel(model, select(model, 0.3))
    everything = gradients(wrapped, lambda: model(X).square().sum())
    values = values_of(wrapped)
    for name in ("0.weight", "0.bias", "2.weight", "5.bias"):
        values[name].requires_grad_(False)
    some = gradients(wrapped, lambda: model(X).square().sum())
    assert some.keys() == {"2.bias", "5.weight"}
    assert all(torch.equal(some[name], everything[name]) for name in some)
    assert not model[0](X).requires_grad


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_their_taps(make: Callable[[PieceModel], PieceModel]) -> None:
    wrapped = PieceModel(net(), select(net(), 0.1))
    twin = make(wrapped)
    expected = gradients(wrapped, lambda: wrapped.model(X).square().sum())
    found = gradients(twin, lambda: twin.model(X).square().sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert twin.model[0].__dict__[TAP] is not wrapped.model[0].__dict__[TAP]
    assert type(twin.unload()[0]) is nn.Linear


def test_moving_makes_the_taps_anew() -> None:
    wrapped = PieceModel(net(), select(net(), 0.05))
    before = wrapped.model[0].__dict__[TAP]
    expected = gradients(wrapped, lambda: wrapped.model(X).square().sum())
    wrapped.double().float()
    tap = wrapped.model[0].__dict__[TAP]
    assert tap is not before and torch.equal(tap.used, before.used)
    found = gradients(wrapped, lambda: wrapped.model(X).square().sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_replaced_weight_and_a_kept_method_are_those_of_the_plain_layer() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    model = nn.Sequential(layer)
    wrapped = PieceModel(model, select(model, 0.3))
    forward = layer.forward
    swapped = torch.func.functional_call(layer, {"weight": torch.zeros(3, 4)}, (x,))
    assert torch.equal(swapped, layer.bias.expand(2, 3))
    wrapped.unload()
    forward(input=x).sum().backward()
    assert layer.weight.grad is not None


def test_what_the_tap_saved_must_not_be_written_before_backward() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    PieceModel(layer, select(layer, 1.0))
    y = layer(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    PieceModel(layer, select(layer, 1.0))
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_compiled_without_a_graph_break(density: float) -> None:
    model = llama()
    part = nn.Sequential(model.model.embed_tokens, model.model.layers[0].mlp, net()[3])
    wrapped = PieceModel(part, select(part, density))
    ids, loss = DATA["input_ids"], lambda run: run(DATA["input_ids"]).square().sum()
    plain = gradients(wrapped, lambda: loss(part))
    torch._dynamo.reset()
    run = torch.compile(lambda i: part[2](part[1](part[0](i))), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(ids), part(ids))
    compiled = gradients(wrapped, lambda: loss(run))
    assert len(plain) == 4
    for name, gradient in plain.items():
        assert torch.equal(compiled[name], gradient), name


# -------------------------------------------------------------------------- what backward costs


def saved_bytes(loss: Loss) -> dict[int, int]:
    """Bytes kept for backward, by storage."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return {address: t.untyped_storage().nbytes() for address, t in kept.items()}


class Siblings(nn.Module):
    """Three layers with one input, a fourth behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 8, bias=False) for _ in range(3))
        self.down = nn.Linear(24, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([self.q(x), self.k(x), self.v(x)], -1)).sum()


@pytest.mark.parametrize(("columns", "kept"), [((8, 8, 8), 24), ((16, 8, 8), 32), ((1, 0, 0), 1)])
def test_columns_are_copied_only_where_all_copies_together_are_smaller(
    columns: tuple[int, ...], kept: int
) -> None:
    model, x = Siblings(), torch.randn(7, 32)
    positions = {
        f"{name}.weight": torch.tensor([c % 8 * 32 + c for c in range(count)]).sort().values
        for name, count in zip("qkv", columns, strict=True)
        if count
    }
    chosen = Selection(positions, dict.fromkeys(positions, (8, 32)), 2 * 24 * 32)
    PieceModel(model, chosen)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = saved_bytes(lambda: model(x))
    activations = [n for address, n in found.items() if address not in weights and n % 28 == 0]
    assert sum(activations) == 7 * kept * 4
    assert (x.untyped_storage().data_ptr() in found) == (kept == 32)


def test_nothing_is_saved_or_propagated_below_the_lowest_selected_layer() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    wrapped = PieceModel(model, select(model, 0.5, "2."))
    x = torch.randn(3, 4)
    below = model[1](model[0](x))
    assert not below.requires_grad
    y = model[2](below)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    above = saved_bytes(lambda: model[3](y))
    assert above.keys() <= weights  # for the gradient of its input, nothing else
    y.sum().backward()
    assert {n for n, v in values_of(wrapped).items() if v.grad is not None} == {
        "2.weight",
        "2.bias",
    }
