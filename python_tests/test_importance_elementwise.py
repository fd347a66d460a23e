"""Scales and shifts: the gradients of all samples from one run of their module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piece_ops.importance.rules as rules
from piece_ops.importance import Importance
from piece_ops.importance.elementwise import rows_of_tokens

from helpers.model_zoo import packed
from helpers.per_sample import assert_true_sums, rows_of, true_gradients
from helpers.tiny_models import batch, llama
from helpers.tolerances import PER_SAMPLE_GRADIENT

WIDTH, SAMPLES, TOKENS = 6, 4, 5


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples that modules ran again for, alone."""
    seen: list[int] = []
    plain = rules.Rerun._run

    def run(self: Any, sample: int) -> Any:
        seen.append(sample)
        return plain(self, sample)

    monkeypatch.setattr(rules.Rerun, "_run", run)
    return seen


class Scale(nn.Module):
    """A parameter for each feature, used as a function says."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self._use = use

    def forward(self, x: Tensor) -> Tensor:
        return self._use(x, self.weight)


class Net(nn.Module):
    """A linear layer, a module, a linear layer."""

    def __init__(self, module: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.first, self.module, self.last = (
            nn.Linear(WIDTH, WIDTH),
            module,
            nn.Linear(WIDTH, WIDTH),
        )
        self._flat = flat

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.module(y.reshape(-1, WIDTH) if self._flat else y).reshape(x.shape)
        return self.last(y)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * (1.0 + weight.float())).type_as(x)


def heads(x: Tensor, weight: Tensor) -> Tensor:
    return (x.view(*x.shape[:2], 1, -1).expand(-1, -1, 2, -1) * weight).sum(2)


AT_ONCE: dict[str, Callable[[], Net]] = {
    "layer norm": lambda: Net(nn.LayerNorm(WIDTH)),
    "layer norm without bias": lambda: Net(nn.LayerNorm(WIDTH, bias=False)),
    "torch's RMS norm": lambda: Net(nn.RMSNorm(WIDTH)),
    "scale": lambda: Net(Scale(lambda x, w: w * x.tanh())),
    "scale as in Gemma": lambda: Net(Scale(gemma)),
    "of every head": lambda: Net(Scale(heads)),
    "rows one after another": lambda: Net(Scale(lambda x, w: w * x), flat=True),
    "across features": lambda: Net(Scale(lambda x, w: x * w.softmax(-1))),
    "across a sample's tokens": lambda: Net(Scale(lambda x, w: (x * w).cumsum(-2))),
}
ALONE: dict[str, Callable[[], Net]] = {
    "a product": lambda: Net(Scale(lambda x, w: x * (x @ w)[..., None])),
    "a mean over all copies": lambda: Net(Scale(lambda x, w: x * w.mean())),
    "another sum with copies": lambda: Net(Scale(lambda x, w: x * w.sum())),
    "not one a feature": lambda: Net(nn.PReLU()),
    "not flat": lambda: Net(nn.LayerNorm((TOKENS, WIDTH))),
}


def data(seed: int) -> list[Tensor]:
    return [torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))]


def distance(model: nn.Module, given: list[Tensor]) -> Tensor:
    return (model(given[0]) - 0.5).square().mean()


def check(net: nn.Module) -> None:
    importance = Importance(net, "piece-s", loss_fn=distance)
    truth = true_gradients(net, rows_of(data(1)) + rows_of(data(2)), distance)
    importance.update(data(1))
    importance.update(data(2))
    assert importance.looped == {}
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


@pytest.mark.parametrize("kind", AT_ONCE)
def test_all_samples_at_once(kind: str, runs: list[int]) -> None:
    """Samples run alone once, to see that it is so: with the first batch."""
    torch.manual_seed(0)
    check(AT_ONCE[kind]())
    assert runs == list(range(SAMPLES)) * (len(runs) // SAMPLES)
    assert len(runs) in (SAMPLES, 2 * SAMPLES), "once a parameter"


@pytest.mark.parametrize("kind", ALONE)
def test_samples_alone_where_copies_are_not_the_parameter(kind: str, runs: list[int]) -> None:
    torch.manual_seed(0)
    check(ALONE[kind]())
    assert len(runs) >= 2 * SAMPLES, "in both batches"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_norms_of_a_model(dtype: torch.dtype, is_packed: bool, runs: list[int]) -> None:
    model = llama().to(dtype)
    importance = Importance(model, "piece-f")
    given = (
        packed([batch(1, length, seed=length) for length in (6, 4, 9)])
        if is_packed
        else batch(3, seed=0)
    )
    importance.update(given)
    assert runs
    runs.clear()
    importance.update(given)
    assert not runs
    assert importance.looped == {}


def test_the_parameter_comes_back(runs: list[int]) -> None:
    """Also where the module does not run with copies."""
    for make in (AT_ONCE["scale"], ALONE["a product"]):
        net: Any = make()
        weight = net.module.weight
        x, grad = data(0)[0], data(1)[0]
        rows = rows_of_tokens(
            net.module,
            {"weight": "w"},
            torch.utils._pytree.tree_flatten(((x,), {})),
            [grad],
            torch.enable_grad,
        )
        assert net.module.weight is weight
        assert (rows is None) == (make is ALONE["a product"])
        assert weight.grad is None


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (3, 5, 4, 5)])
def test_all_samples_are_added_in_one_call(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm's scale and its shift; neither by a call a sample."""
    model = llama().to(torch.float32)
    model.model.norm = nn.LayerNorm(model.config.hidden_size)
    importance = Importance(model, "piece-s", include=["model.norm.*", "*.input_layernorm.*"])
    given = packed([batch(1, length, seed=n) for n, length in enumerate(lengths)])
    importance.update(given)
    added: list[int] = []
    real = rules.cpu.add_per_sample_squares

    def counted(squares: Any, ones: Tensor, rows: Tensor, *rest: Any) -> bool:
        added.append(len(rows))
        return real(squares, ones, rows, *rest)

    def refuse(*_: Any) -> None:
        raise AssertionError("one sample alone")

    monkeypatch.setattr(rules.cpu, "add_per_sample_squares", counted)
    monkeypatch.setattr(rules.Target, "add", refuse)
    importance.update(given)
    assert len(importance._square_sums) >= 4
    assert added == [len(lengths)] * len(importance._square_sums)


def test_a_gradient_that_is_not_finite_names_its_sample() -> None:
    net = Net(Scale(lambda x, w: w * x))
    importance = Importance(net, "piece-f", loss_fn=distance, include="module.*")
    importance.update(data(1))

    def spoil(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output.register_hook(lambda grad: grad.index_fill(0, torch.tensor([2]), float("inf")))

    net.module.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"gradient of sample 6 \(row 2 .*'module\.weight'"):
        importance.update(data(2))
