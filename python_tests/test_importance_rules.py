"""Per-sample rules on plain modules: what is covered, what goes by the loop, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import piece_ops.importance.rules as rules
from piece_ops.importance import Importance, estimate
from piece_ops.importance.batches import samples_of
from piece_ops.importance.budget import needs_of, peak_of

from helpers.model_zoo import packed, words
from helpers.per_sample import assert_true_sums, rows_of, true_gradients
from helpers.tiny_models import batch, llama
from helpers.tolerances import PER_SAMPLE_GRADIENT

WIDTH = 6


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """Some modules by name, and a function of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Shift(nn.Module):
    """Adds a parameter; autograd needs nothing of the input for that."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.amount


class Outer(nn.Module):
    """Reads its own parameter inside, and its part's from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.part = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * self.scale


class Table(nn.Module):
    """One row for all samples, as position embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.values * 2.0


class TwoResults(nn.Module):
    """The second result is computed from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        return logits, logits.softmax(-1), logits.argmax(-1)


def linear(**settings: Any) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, **settings)


def write_input(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.shift(y)
    y += 1.5
    return m.b(z) + y


def write_output(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    y *= 2.0
    return y


def tied() -> Net:
    net = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=linear(), b=linear())
    net.b.weight = net.a.weight
    return net


COVERED: dict[str, Callable[[], Net]] = {
    "called twice": lambda: Net(
        lambda m, x: m.a(m.norm(torch.tanh(m.norm(m.a(x))))), a=linear(), norm=nn.LayerNorm(WIDTH)
    ),
    "tied linear layers": tied,
    "convolution": lambda: Net(
        lambda m, x: m.conv(m.a(x).transpose(1, 2)),
        a=linear(),
        conv=nn.Conv1d(WIDTH, 4, 3, padding=1, groups=2),
    ),
    "batch norm in evaluation": lambda: Net(
        lambda m, x: m.bn(m.a(x).transpose(1, 2)), a=linear(), bn=nn.BatchNorm1d(WIDTH).eval()
    ),
    "a parameter around a part": lambda: Net(lambda m, x: m.o(m.a(x)), a=linear(), o=Outer()),
    "a table for all samples": lambda: Net(
        lambda m, x: m.a(x + m.table(x)), a=linear(), table=Table()
    ),
    "several results": lambda: Net(
        lambda m, x: sum(m.two(m.a(x))[:2]), a=linear(), two=TwoResults()
    ),
    "flattened tokens": lambda: Net(
        lambda m, x: m.b(m.a(x).reshape(-1, WIDTH)).reshape(x.shape), a=linear(), b=linear()
    ),
    "pooled": lambda: Net(lambda m, x: m.b(m.a(x).mean(1)), a=linear(), b=linear()),
    "in-place activation": lambda: Net(
        lambda m, x: m.b(m.relu(m.conv(x))),
        conv=nn.Conv1d(5, 5, 1),
        relu=nn.ReLU(inplace=True),
        b=linear(),
    ),
    "an unused layer": lambda: Net(
        lambda m, x: m.a(x) + 0 * m.b(x).detach(), a=linear(), b=linear()
    ),
}
LOOPED: dict[str, tuple[Callable[[], Net], str, str]] = {
    "read elsewhere": (
        lambda: Net(lambda m, x: F.linear(m.b(x), m.a.weight) + m.a(x), a=linear(), b=linear()),
        "a.weight",
        "another module",
    ),
    "attention's output layer": (
        lambda: Net(
            lambda m, x: m.mha(x, x, x)[0], mha=nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        ),
        "mha.out_proj.weight",
        "another module",
    ),
    "weight norm": (
        lambda: Net(
            lambda m, x: m.b(m.a(x)),
            a=linear(),
            b=nn.utils.parametrizations.weight_norm(linear()),
        ),
        "b.parametrizations.weight.original0",
        "all samples together",
    ),
    "a table that must keep its one row": (
        lambda: Net(lambda m, x: m.a(x + m.table(x).reshape(5, WIDTH)), a=linear(), table=Table()),
        "table.values",
        "all samples together",
    ),
    "lstm": (
        lambda: Net(
            lambda m, x: m.lstm(m.a(x))[0], a=linear(), lstm=nn.LSTM(WIDTH, 4, batch_first=True)
        ),
        "lstm.weight_ih_l0",
        "one after another",
    ),
    "samples in dimension 1": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).transpose(0, 1)).transpose(0, 1), a=linear(), b=linear()
        ),
        "b.weight",
        "one after another",
    ),
    "input written later": (
        lambda: Net(write_input, a=linear(), b=linear(), shift=Shift()),
        "shift.amount",
        "in place",
    ),
    "output written later": (
        lambda: Net(write_output, a=linear(), b=linear()),
        "b.bias",
        "in place",
    ),
}


def data(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, WIDTH, generator=generator)]


def distance(model: nn.Module, given: list[Tensor]) -> Tensor:
    return (model(given[0]) - 0.5).square().mean()


def check(net: nn.Module) -> Importance:
    importance = Importance(net, "piece-s", loss_fn=distance)
    truth = true_gradients(net, rows_of(data(1)) + rows_of(data(2)), distance)
    importance.update(data(1))
    importance.update(data(2))
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)
    return importance


@pytest.mark.parametrize("kind", COVERED)
def test_covered_by_a_rule(kind: str) -> None:
    torch.manual_seed(0)
    assert check(COVERED[kind]()).looped == {}


@pytest.mark.parametrize("kind", LOOPED)
def test_left_to_the_loop_with_a_reason(kind: str) -> None:
    make, name, reason = LOOPED[kind]
    torch.manual_seed(0)
    looped = check(make()).looped
    assert reason in looped[name], looped
    assert "a.weight" not in looped or name == "a.weight"


@pytest.mark.parametrize(
    ("settings", "is_looped"),
    [
        ({"padding_idx": 2}, False),
        ({"sparse": True}, False),
        ({"max_norm": 1.0}, True),
        ({"scale_grad_by_freq": True}, True),
    ],
)
def test_embeddings(settings: dict[str, Any], is_looped: bool) -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.a(m.table(x)), table=nn.Embedding(9, WIDTH, **settings), a=linear())
    ids = [torch.randint(9, (4, 5))]
    importance = Importance(net, "piece-s", loss_fn=distance, embeddings=True)
    truth = true_gradients(net, rows_of(ids), distance)
    importance.update(ids)
    assert ("table.weight" in importance.looped) == is_looped
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


def test_a_gradient_hook_of_the_callers_still_sees_every_samples_gradient() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear())
    net.b.weight.register_hook(lambda grad: grad * 3.0)
    importance = Importance(net, "piece-s", loss_fn=distance)
    importance.update(data())
    assert set(importance.looped) == {"b.weight"}
    truth = true_gradients(net, rows_of(data()), distance)
    truth["b.weight"] *= 3.0
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


def test_a_frozen_part_is_left_alone_and_nothing_runs_below_the_lowest_candidate() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear())
    seen: list[bool] = []
    net.a.register_forward_hook(lambda _m, _a, output: seen.append(output.requires_grad))
    importance = Importance(net, "piece-s", loss_fn=distance, include="b.*")
    importance.update(data())
    assert not any(seen) and importance.looped == {}
    assert_true_sums(
        importance, true_gradients(net, rows_of(data()), distance), PER_SAMPLE_GRADIENT
    )


# ---------------------------------------------------------------------------------------- memory


def test_what_a_module_saved_goes_as_soon_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, backward frees inputs: when the last one is used, the first ones are gone."""
    import weakref

    torch.manual_seed(0)
    layers = {f"l{n}": linear() for n in range(4)}
    net = Net(lambda m, x: m.l3(m.l2(m.l1(m.l0(x)))), **layers)
    importance = Importance(net, "piece-s", loss_fn=distance)
    importance.update(data())
    alive: list[weakref.ref[Tensor]] = []
    real = rules.cpu.add_per_sample_squares

    def watched(squares: Any, grad: Tensor, inputs: Tensor, *rest: Any) -> bool:
        if grad.shape[1] == 1:  # a bias, made of sums that are its own
            return real(squares, grad, inputs, *rest)
        assert all(old() is None for old in alive)
        overflowed = real(squares, grad, inputs, *rest)
        alive.extend([weakref.ref(grad), weakref.ref(inputs)])
        return overflowed

    monkeypatch.setattr(rules.cpu, "add_per_sample_squares", watched)
    importance.update(data(1))
    assert len(alive) == 8


# ---------------------------------------------------------------------------------------- errors


def test_batch_norm_in_training_mode_is_refused() -> None:
    net = Net(lambda m, x: m.bn(m.a(x).transpose(1, 2)), a=linear(), bn=nn.BatchNorm1d(WIDTH))
    importance = Importance(net, loss_fn=distance)
    with pytest.raises(ValueError, match=r"batch norm in training mode \('bn'\); call model.eval"):
        importance.update(data())
    loop = Importance(net, loss_fn=distance, per_sample="loop")
    loop.update(data())
    assert loop.sample_count == 4


def test_a_sample_without_answer_is_named_and_nothing_is_added() -> None:
    model = llama()
    importance = Importance(model, "piece-s")
    importance.update(words(seed=1))
    before = {n: t.clone() for n, t in importance._square_sums.items()}
    bad = words(seed=2)
    bad["labels"][2] = -100
    with pytest.raises(
        ValueError, match=r"sample 6 \(row 2 of its batch\) must be finite, got nan"
    ):
        importance.update(bad)
    assert importance.sample_count == 4
    assert all(torch.equal(before[n], t) for n, t in importance._square_sums.items())
    only = packed([batch(1, 4, seed=1), batch(1, 1, seed=2), batch(1, 5, seed=3)])
    with pytest.raises(ValueError, match=r"sample 5 .*no token counts"):
        importance.update(only)


def test_a_gradient_that_is_not_finite_names_parameter_and_sample_and_spoils() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear())

    def loss_fn(model: Any, given: list[Tensor]) -> Tensor:
        kept = model(given[0])
        if kept.shape[0] == 4:
            kept.register_hook(lambda grad: grad.index_fill(0, torch.tensor([2]), float("nan")))
        return kept.square().mean()

    importance = Importance(net, "piece-s", loss_fn=loss_fn)
    with pytest.raises(
        ValueError, match=r"gradient of sample 2 \(row 2 .*finite.*'b\.(weight|bias)'"
    ):
        importance.update(data())
    assert not net.a._forward_hooks and not net.a._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("accumulators", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", [True, "loop", False])
@pytest.mark.parametrize("size", [1e11, 1e20])  # a square overflows; a product does
def test_finite_factors_whose_products_overflow_raise_and_spoil(
    size: float, how: Any, accumulators: str
) -> None:
    net, factor = Net(lambda m, x: m.a(x), a=linear()), 1.0

    def loss_fn(model: Any, given: list[Tensor]) -> Tensor:
        output = model(given[0])
        return (factor * (output - output.detach())).mean()  # finite: zero

    settings: dict[str, Any] = {"loss_fn": loss_fn, "per_sample": how, "accumulators": accumulators}
    importance = Importance(net, "piece-s", **settings)
    importance.update(data())
    factor, wrong = size, [size * x for x in data()]
    with pytest.raises(ValueError, match=r"must be finite.*'a\.weight'"):
        importance.update(wrong)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        importance.select(k=1)
    budget = peak_of([needs_of(importance)["a.weight"]])
    with pytest.raises(ValueError, match=r"must be finite.*'a\.(weight|bias)'"):  # one pass
        estimate(net, [wrong], k=1, memory_budget=budget, **settings)


def test_a_loss_without_candidates_is_refused() -> None:
    net = Net(lambda m, x: m.a(x), a=linear(), b=linear())
    importance = Importance(net, "piece-s", loss_fn=distance, include="b.*")
    with pytest.raises(ValueError, match="must depend on the candidate parameters"):
        importance.update(data())


def test_per_sample_is_true_false_or_loop() -> None:
    with pytest.raises(ValueError, match="True, False or 'loop', got 'batch'"):
        Importance(linear(), per_sample="batch")


# --------------------------------------------------------------------------------------- batches


def test_a_batch_is_cut_into_rows_or_packed_sequences() -> None:
    given = packed([batch(1, n, seed=n) for n in (4, 3)])
    given = {key: torch.cat([value, value]) for key, value in given.items()}
    given["cu_seq_lens_q"] = torch.tensor([0, 4, 7])
    samples = samples_of(given, trim=True, where="here")
    assert samples.grid.spans == ((0, 0, 4), (0, 4, 7), (1, 0, 4), (1, 4, 7))
    assert [part["input_ids"].shape[1] for part in samples.alone] == [4, 3, 4, 3]
    assert "cu_seq_lens_q" not in samples.parts[0]
    padded = words(seed=1)
    padded["position_ids"] = torch.zeros_like(padded["input_ids"])
    mask = padded["attention_mask"]
    padded["position_ids"][:, :] = (
        torch.arange(mask.shape[1]) * mask
    )  # 0 again where padding begins
    assert samples_of(padded, trim=True, where="here").grid.spans == ()
    flipped = {key: value.flip(1) for key, value in padded.items()}
    flipped["position_ids"] = (flipped["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert samples_of(flipped, trim=True, where="here").grid.spans == ()
