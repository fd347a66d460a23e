"""PieceModel: what trains, what must not move, and that the model stays an ordinary one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piece_ops.importance import estimate
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection

from helpers.exact_gradients import general_route
from helpers.tiny_models import MODELS, batch, gpt2, llama, random_positions

DATA = batch(3, 7, seed=1)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """These models are too small to share; a second thread only waits."""
    torch.set_num_threads(1)


def select(model: nn.Module, density: float = 0.05, *names: str) -> Selection:
    """Random positions of every parameter, or of those whose name contains one of `names`."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    positions = random_positions(model, density)
    if names:
        positions = {n: p for n, p in positions.items() if any(part in n for part in names)}
    return Selection(positions, shapes, sum(p.numel() for p in model.parameters()))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, as integers."""
    views = {2: torch.int16, 4: torch.int32}
    return {
        n: p.detach().clone().view(views[p.element_size()]) for n, p in model.named_parameters()
    }


def assert_only_selected_changed(model: nn.Module, before: dict[str, Tensor], s: Selection) -> int:
    """Returns how many weights did change."""
    changed = 0
    for name, now in bits(model).items():
        moved = torch.nonzero((now != before[name]).flatten()).flatten()
        allowed = s.indices.get(name, torch.empty(0, dtype=torch.int64))
        assert bool(torch.isin(moved, allowed).all()), name
        changed += moved.numel()
    return changed


def values_of(model: PieceModel) -> dict[str, nn.Parameter]:
    return dict(model.values.named_parameters())


def dense_gradients(model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**data).loss.backward()
    found = {name: p.grad.float().flatten() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("model_name", MODELS)
def test_the_general_route_gathers_from_the_dense_gradients(
    model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    general_route(monkeypatch)
    model = MODELS[model_name]()
    chosen = select(model)
    dense, loss = dense_gradients(model, DATA), model(**DATA).loss
    wrapped = PieceModel(model, chosen)
    assert torch.equal(wrapped(**DATA).loss, loss)
    wrapped(**DATA).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, values in values_of(wrapped).items():
        assert values.dtype == values.grad.dtype == torch.float32
        wanted = dense[name][chosen.indices[name]]
        if "bf16" in model_name or "embed" in name or "wte" in name:  # summed in another order
            torch.testing.assert_close(values.grad, wanted, rtol=2e-2, atol=1e-3)
        else:
            assert torch.equal(values.grad, wanted), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, tied: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = llama(tied=tied).train()
        wrapped = PieceModel(model, select(model, 0.05, "layers", "norm"))
        if checkpointed:
            wrapped.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                wrapped.enable_input_require_grads()
        wrapped(**DATA).loss.backward()
        gradients.append({n: v.grad for n, v in values_of(wrapped).items()})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 15
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_torch_alone_and_a_module_called_twice(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.use_checkpoints = False

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                if self.use_checkpoints:
                    x = checkpoint(self.inner, x, use_reentrant=reentrant)
                else:
                    x = self.inner(x)
            return x.square().sum()

    net, x = Net(), torch.randn(5, 4, requires_grad=True)
    wrapped = PieceModel(net, select(net, 0.5))
    wrapped(x).backward()
    plain = {n: v.grad.clone() for n, v in values_of(wrapped).items()}
    wrapped.zero_grad()
    net.use_checkpoints = True
    wrapped(x).backward()
    for name, values in values_of(wrapped).items():
        torch.testing.assert_close(values.grad, plain[name])


def test_gradients_accumulate_in_float32_over_bf16_weights() -> None:
    model = llama(dtype=torch.bfloat16)
    wrapped = PieceModel(model, select(model))
    batches = [batch(2, 6, seed=s) for s in range(4)]
    expected: dict[str, Tensor] = {}
    for data in batches:
        wrapped.zero_grad()
        wrapped(**data).loss.backward()
        for name, values in values_of(wrapped).items():
            expected[name] = expected.get(name, 0) + values.grad
    wrapped.zero_grad()
    for data in batches:
        wrapped(**data).loss.backward()
    for name, values in values_of(wrapped).items():
        assert torch.equal(values.grad, expected[name])


class Odd(nn.Module):
    """Ways in which modules get at their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)  # reads out_proj.weight
        self.recurrent = nn.LSTM(8, 8, batch_first=True)  # reads a list of weights
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.embedding = nn.Embedding(11, 8, sparse=True)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.pieces = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.named = nn.ParameterDict({"one": nn.Parameter(torch.randn(8))})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x, _ = self.attention(x, x, x, need_weights=False)
        x, _ = self.recurrent(x)
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = F.layer_norm(x, (8,), self.norm.weight, self.norm.bias) * self.scale
        x = x @ self.pieces[0] + x @ self.pieces[1].t() + self.named["one"]
        return self.normed(x).square().mean()


def test_modules_that_use_their_weights_in_other_ways() -> None:
    model, ids = Odd(), torch.randint(0, 11, (3, 5))
    model(ids).backward()
    dense = {n: p.grad.to_dense() for n, p in model.named_parameters()}
    model.zero_grad()
    chosen = select(model, 0.4)
    wrapped = PieceModel(model, chosen)
    wrapped(ids).backward()
    for name, values in values_of(wrapped).items():
        wanted = dense[name].flatten()[chosen.indices[name]]
        torch.testing.assert_close(values.grad, wanted, msg=name)
    before = bits(model)
    SparseAdamW(wrapped.parameters(), lr=1e-2).step()
    assert assert_only_selected_changed(model, before, chosen) > 0.9 * chosen.k
    wrapped.unload()
    assert type(model.recurrent) is nn.LSTM
    model(ids).backward()
    assert model.recurrent.weight_ih_l0.grad is not None


def test_no_graph_without_gradients() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model))
    weight = model.lm_head.weight
    assert (
        weight.requires_grad and weight.data_ptr() == values_target(wrapped, "lm_head").data_ptr()
    )
    with torch.no_grad():
        assert model.lm_head.weight is values_target(wrapped, "lm_head")
    wrapped.values.requires_grad_(False)
    assert model.lm_head.weight is values_target(wrapped, "lm_head")
    assert not wrapped(**DATA).loss.requires_grad


def values_target(wrapped: PieceModel, part: str) -> nn.Parameter:
    return next(p for n, p in wrapped.model.named_parameters() if part in n)


def test_a_weight_written_between_forward_and_backward_is_an_error() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model))
    loss = wrapped(**DATA).loss
    with torch.no_grad():
        values_target(wrapped, "o_proj").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------ what moves, what does not


@pytest.mark.parametrize("model_name", MODELS)
def test_unselected_weights_keep_every_bit(model_name: str) -> None:
    model = MODELS[model_name]()
    chosen = estimate(model, [DATA], "piece-f", density=0.01, embeddings=True)
    before = bits(model)
    wrapped = PieceModel(model, chosen)
    optimizer = SparseAdamW(wrapped.parameters(), lr=3e-2, weight_decay=0.1)
    for step in range(5):
        wrapped(**batch(3, 7, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.generate(input_ids=DATA["input_ids"][:1, :3], max_new_tokens=2, pad_token_id=0)
    assert wrapped.unload() is model
    assert assert_only_selected_changed(model, before, chosen) > 0.8 * chosen.k


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    ],
    ids=["sgd", "adamw", "foreach", "fused"],
)
def test_other_optimizers_reach_the_weights_before_the_next_use(make: Any) -> None:
    model = llama(dtype=torch.bfloat16)
    chosen, before = select(model), bits(model)
    wrapped = PieceModel(model, chosen)
    optimizer = make([p for p in wrapped.parameters() if p.requires_grad])
    for _ in range(2):
        wrapped(**DATA).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wrapped(**DATA)
    for target in wrapped._targets:
        held = target.weight.flatten()[target.indices]
        assert torch.equal(held, target.values.to(torch.bfloat16))
    assert assert_only_selected_changed(model, before, chosen) > 0.5 * chosen.k


class PastTheCounter(torch.optim.Optimizer):
    """Writes through .data, which the version counter does not see."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad)


def test_an_optimizer_that_writes_past_the_version_counter_is_noticed() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model))
    optimizer = PastTheCounter(wrapped.values.parameters())
    wrapped(**DATA).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert wrapped.sync_() == len(wrapped._targets)
    assert wrapped.sync_() == 0
    for target in wrapped._targets:
        assert torch.equal(target.weight.flatten()[target.indices], target.values)


def test_nothing_is_written_while_nothing_has_changed() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model))
    versions = [p._version for p in model.parameters()]
    wrapped(**DATA).loss.backward()
    wrapped(**DATA).loss.backward()
    wrapped.state_dict()
    assert [p._version for p in model.parameters()] == versions
    optimizer = SparseAdamW(wrapped.parameters())
    optimizer.step()
    after = [p._version for p in model.parameters()]
    assert after != versions
    wrapped(**DATA)
    assert [p._version for p in model.parameters()] == after


def test_a_bf16_weight_moves_when_its_rounded_master_does() -> None:
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    chosen = Selection({"weight": torch.tensor([0])}, {"weight": (1, 1)}, 1)
    wrapped = PieceModel(layer, chosen)
    optimizer = torch.optim.SGD(wrapped.values.parameters(), lr=1.0)
    values = values_of(wrapped)["weight"]
    seen = []
    for _ in range(4):
        values.grad = torch.tensor([-(2.0**-9)])  # a quarter of bfloat16's step above 1 is 2^-9
        optimizer.step()
        wrapped.sync_()
        seen.append(float(layer.weight.detach()))
    assert seen == [1.0, 1.0, 1 + 2**-7, 1 + 2**-7]  # half way rounds to even, 3/4 up
    assert float(values.detach()) == 1 + 4 * 2**-9


# ------------------------------------------------------------------------- still an ordinary model


@pytest.mark.parametrize("tied", [False, True])
def test_names_folders_and_attributes_stay_those_of_the_model(tied: bool, tmp_path: Path) -> None:
    model = llama(tied=tied)
    names = [name for name, _ in model.named_parameters()]
    keys = list(model.state_dict())
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    wrapped = PieceModel(model, select(model))
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert {n: type(m).__name__ for n, m in model.named_modules()} == classes
    assert isinstance(model.lm_head, nn.Linear)
    assert wrapped.config is model.config and wrapped.device == model.device
    assert inspect.signature(wrapped.forward) == inspect.signature(model.forward)
    model.tie_weights()
    assert model.get_parameter("lm_head.weight") is model._modules["lm_head"]._parameters["weight"]

    optimizer = torch.optim.SGD(wrapped.values.parameters(), lr=0.5)
    wrapped(**DATA).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "wrapped")
    loss = wrapped(**DATA).loss
    wrapped.unload().save_pretrained(tmp_path / "plain")
    for folder in ("wrapped", "plain"):
        loaded = type(model).from_pretrained(tmp_path / folder).eval()
        assert torch.equal(loaded(**DATA).loss, loss)


def test_unload_restores_classes_and_flags() -> None:
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    classes = [type(module) for module in model.modules()]
    hooks = len(model._forward_pre_hooks)
    wrapped = PieceModel(model, select(model))
    assert not any(p.requires_grad for p in model.parameters())
    assert wrapped.unload() is model
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(module) for module in model.modules()] == classes
    assert len(model._forward_pre_hooks) == hooks and not model._state_dict_pre_hooks
    assert "get_parameter" not in vars(model)
    with pytest.raises(RuntimeError, match="has been unloaded"):
        wrapped.sync_()
    dense_gradients(model.requires_grad_(True), DATA)
    again = PieceModel(model, select(model, 0.01))
    again(**DATA).loss.backward()


def test_copies_are_independent() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model))
    before = bits(model)
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert twin.model is not model
        assert len(twin.model._forward_pre_hooks) == len(model._forward_pre_hooks) == 1
        optimizer = SparseAdamW(twin.parameters(), lr=1e-2)
        loss = twin(**DATA).loss
        assert torch.equal(loss, wrapped(**DATA).loss)
        loss.backward()
        assert all(values.grad is None for values in wrapped.values.parameters())
        optimizer.step()
        assert twin(**DATA).loss < loss
        twin(**DATA).loss.backward()
        PastTheCounter(twin.values.parameters()).step()
        assert twin.sync_() > 0
        assert_only_selected_changed(twin.unload(), before, wrapped.selection)
    assert all(torch.equal(before[n], now) for n, now in bits(model).items())
    torch.save(wrapped.state_dict(), io.BytesIO())


def test_moving_to_another_dtype_keeps_the_masters() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model))
    masters = {n: v.detach().clone() for n, v in values_of(wrapped).items()}
    wrapped.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    wrapped.float()
    wrapped(**DATA)
    for target in wrapped._targets:
        assert torch.equal(target.values, masters[target.name])
        assert torch.equal(target.weight.flatten()[target.indices], masters[target.name])


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(tied=True)
    total = sum(p.numel() for p in model.parameters())
    wrapped = PieceModel(model, estimate(model, method="magnitude", k=100))
    wrapped.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: 100 || all params: {total:,d} || trainable%: {10000 / total:.4f}\n"
    )


# ---------------------------------------------------------------------------------------- bad input


def assert_plain(model: nn.Module) -> None:
    assert type(model.lm_head) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert not model._forward_pre_hooks


def test_bad_input_is_refused_and_leaves_the_model_alone() -> None:
    model = llama()
    chosen = select(model)
    empty = Selection({}, chosen.shapes, chosen.total)
    wrong = Selection({"model.norm.weight": torch.tensor([25])}, {"model.norm.weight": (26,)}, 26)
    other = Selection({"nothing": torch.tensor([0])}, {"nothing": (1,)}, 1)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (model, empty, ValueError, "at least one coordinate, got none"),
        (model, wrong, ValueError, r"'model.norm.weight' is \[24\] in the model and \[26\] here"),
        (model, other, ValueError, "1 names it lacks: 'nothing'"),
        (model, {"a": 1}, TypeError, "must be a Selection, got dict"),
        ("model", chosen, TypeError, "must be a torch.nn.Module, got str"),
    ]
    for given, selection, error, message in cases:
        with pytest.raises(error, match=message):
            PieceModel(given, selection)
        assert_plain(model)
    model.lm_head.double()
    with pytest.raises(TypeError, match=r"got torch.float64 for 'lm_head.weight'"):
        PieceModel(model, chosen)
    model.lm_head.float()
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match=r"contiguous, got strides \(1, 61\) for 'lm_head.weight'"):
        PieceModel(model, chosen)
    assert_plain(model)


def test_wrapping_twice_is_refused() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model, 0.05, "layers"))
    for again in (model, wrapped, model.model):
        with pytest.raises(ValueError, match="must not be wrapped already"):
            PieceModel(again, select(llama(), 0.05, "norm"))
    with pytest.raises(ValueError, match=r"got a PieceModel; call its unload\(\) first"):
        estimate(wrapped, [DATA], k=1)
    with pytest.raises(ValueError, match=r"a PieceModel freezes all until unload\(\)"):
        estimate(model, [DATA], k=1)


def test_a_replaced_weight_is_noticed() -> None:
    model = llama()
    wrapped = PieceModel(model, select(model))
    model.lm_head.weight = nn.Parameter(torch.zeros(61, 24))
    with pytest.raises(RuntimeError, match=r"'lm_head.weight' has been replaced; call unload\(\)"):
        wrapped(**DATA)
