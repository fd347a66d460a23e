"""Training steps with sampled gradients: what they allocate and run; they learn the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.allocations import Allocations
from piece_ops import PieceModel, Selection, SparseAdamW

from helpers.exact_gradients import general_route
from helpers.tiny_models import batch, gpt2, llama, random_positions
from helpers.tolerances import (
    TRAINING_50_STEPS,
    TRAINING_50_STEPS_BF16,
    TRAINING_50_STEPS_BF16_REAL,
)

MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "gpt2": gpt2,
}
TOKENS = 3 * 7  # no weight of these models has 21 or a multiple of it as one side


def wrap(model: Any, density: float = 0.05) -> PieceModel:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    return PieceModel(model, Selection(random_positions(model, density), shapes, total))


def step(wrapped: Any, optimizer: torch.optim.Optimizer, data: dict[str, Tensor]) -> float:
    loss = wrapped(**data).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def tapped_shapes(model: nn.Module) -> set[tuple[int, ...]]:
    """Of the weights of linear layers and embeddings; norms keep the general route."""
    return {tuple(p.shape) for p in model.parameters() if p.dim() == 2}


# ------------------------------------------------------------------- what a step allocates and runs


@pytest.mark.parametrize("is_sampled", [True, False])
@pytest.mark.parametrize("model_name", MODELS)
def test_no_allocation_has_the_size_of_a_weight(
    model_name: str, is_sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The general route fails the same check, so the check sees what it is there for."""
    if not is_sampled:
        general_route(monkeypatch)
    model = MODELS[model_name]().train()
    smallest = 4 * min(torch.Size(shape).numel() for shape in tapped_shapes(model))
    wrapped = wrap(model)
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
    found = []
    for seed in range(2):  # the first step makes the optimizer's state
        with Allocations(*model.parameters()) as allocations:
            # Three tokens: no activation, not even the logits, is as large as the smallest weight.
            step(wrapped, optimizer, batch(1, 3, seed=seed))
        assert len(allocations.made) > 100
        found += [made for made in allocations.made if made[2] >= smallest]
    assert (not found) == is_sampled, found[:5]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_step_raises_resident_memory_by_little() -> None:
    """In native code, too: a weight of 4096 x 4096, 8 tokens. The general route shows in it."""
    worker = Path(__file__).parent / "helpers" / "peak_worker.py"
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shares = json.loads(done.stdout)
    assert max(shares["sampled"]) < 0.05, shares
    assert min(shares["general"]) > 0.5, shares


def weight_gradient_products(run: Callable[[], Any]) -> list[Any]:
    """Matrix products that sum over the tokens: those of weight gradients, and no others here."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        run()
    products = [event.input_shapes for event in profiled.events() if event.name == "aten::mm"]
    assert len(products) >= 9  # gradients of inputs
    return [shapes for shapes in products if shapes[0][1] == TOKENS]


@pytest.mark.parametrize(("model_name", "layers"), [("llama", 15), ("llama tied", 15), ("gpt2", 9)])
def test_no_matrix_product_makes_a_weight_gradient(
    model_name: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_sampled in (True, False):
        if not is_sampled:
            general_route(monkeypatch)
        wrapped = wrap(MODELS[model_name]())
        optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
        found = weight_gradient_products(lambda w=wrapped, o=optimizer: step(w, o, batch(3, 7)))
        assert len(found) == (0 if is_sampled else layers), found


# ------------------------------------------------------------------------------- learning the same


def train(model: Any, *, lr: float = 1e-2, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Losses and values of some steps."""
    wrapped = wrap(model)
    optimizer = SparseAdamW(wrapped.parameters(), lr=lr)
    losses = [step(wrapped, optimizer, batch(3, 7, seed=seed % 5)) for seed in range(steps)]
    values = torch.cat([values.detach() for values in wrapped.values.parameters()])
    return torch.tensor(losses), values


@pytest.mark.parametrize("tied", [False, True])
def test_50_steps_equal_those_of_the_dense_route(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, values = train(llama(tied=tied))
    general_route(monkeypatch)
    dense_losses, dense_values = train(llama(tied=tied))
    assert losses[-1] < 0.9 * losses[0]
    for ours, dense in ((losses, dense_losses), (values, dense_values)):
        assert bool(((ours - dense).abs() <= TRAINING_50_STEPS * (1 + dense.abs())).all())


def test_50_steps_over_bf16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, _ = train(llama(dtype=torch.bfloat16))
    general_route(monkeypatch)
    dense, _ = train(llama(dtype=torch.bfloat16))
    assert bool(((losses - dense).abs() <= TRAINING_50_STEPS_BF16 * (1 + dense.abs())).all())


def test_a_compiled_model_learns_the_same_in_one_graph() -> None:
    """Plus a break before the model, where changed values are written."""
    losses = []
    for is_compiled in (False, True):
        wrapped = wrap(llama())
        optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(wrapped, backend="aot_eager") if is_compiled else wrapped
        losses.append([step(run, optimizer, batch(3, 7, seed=seed)) for seed in range(2)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert losses[1] == pytest.approx(losses[0], rel=TRAINING_50_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["llama tied", "gpt2"])
def test_a_model_compiled_by_inductor_learns_the_same(model_name: str) -> None:
    losses = []
    for is_compiled in (False, True):
        wrapped = wrap(MODELS[model_name]())
        optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
        torch._dynamo.reset()
        run = torch.compile(wrapped, backend="inductor") if is_compiled else wrapped
        losses.append([step(run, optimizer, batch(3, 7, seed=seed % 5)) for seed in range(10)])
    # The same five batches, the second time and the first.
    assert sum(losses[1][5:]) < 0.98 * sum(losses[1][:5])
    assert losses[1] == pytest.approx(losses[0], rel=TRAINING_50_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_50_steps_of_a_real_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M, 0.1 % of all weights, embeddings among them."""
    transformers = pytest.importorskip("transformers")
    from demo.model import prepare_model

    folder = prepare_model(Path(__file__).parents[1] / ".cache")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Sparse fine-tuning changes one weight in a thousand and leaves all others as they were."
    data = dict(tokenizer([text, text[20:]], return_tensors="pt", padding=True))
    data["labels"] = data["input_ids"]
    results = []
    for is_sampled in (True, False):
        if not is_sampled:
            general_route(monkeypatch)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        wrapped = wrap(model, 1e-3)
        optimizer = SparseAdamW(wrapped.parameters(), lr=1e-3)
        losses = torch.tensor([step(wrapped, optimizer, data) for _ in range(50)])
        values = torch.cat([values.detach() for values in wrapped.values.parameters()])
        results.append((losses, values))
        del model, wrapped, optimizer
    (losses, values), (dense_losses, dense_values) = results
    assert losses[-1] < 0.8 * losses[0]
    if dtype == torch.bfloat16:
        apart = (losses - dense_losses).abs() / (1 + dense_losses.abs())
        assert apart.mean() <= TRAINING_50_STEPS_BF16
        assert apart.max() <= TRAINING_50_STEPS_BF16_REAL
    else:
        bound = TRAINING_50_STEPS * (1 + dense_losses.abs())
        assert bool(((losses - dense_losses).abs() <= bound).all())
        bound = TRAINING_50_STEPS * (1 + dense_values.abs())
        assert bool(((values - dense_values).abs() <= bound).all())
