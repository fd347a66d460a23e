"""Acceptance on SmolLM2-135M-Instruct itself: the selections, and that nothing else moves.

Slow: needs the model (93 MB, fetched once by the demo's code into .cache) and 5 GB of memory.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from piece_ops import PieceModel, Selection, SparseAdamW, estimate

pytestmark = pytest.mark.slow

PAIRS = [
    ("What is the capital of France?", " Paris"),
    ("Is water wet?", " Yes"),
    ("2 + 2 =", " 4"),
    ("Which month follows May?", " June"),
]


@pytest.fixture(scope="module")
def model_and_batches() -> tuple[Any, list[dict[str, Tensor]]]:
    transformers = pytest.importorskip("transformers")
    from demo.model import prepare_model

    folder = prepare_model(Path(__file__).parents[1] / ".cache")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = []
    for prompt, answer in PAIRS:
        asked, said = (tokenizer(text)["input_ids"] for text in (prompt, answer))
        labels = torch.tensor([[-100] * len(asked) + said])
        batches.append({"input_ids": torch.tensor([asked + said]), "labels": labels})
    return model, batches


def plain_torch_selection(model: Any, batches: list[dict[str, Tensor]], method: str) -> Tensor:
    """Ten lines: flat positions over all candidates, in the model's order of parameters."""
    candidates = [p for name, p in model.named_parameters() if "embed" not in name]
    sums = [torch.zeros_like(p) for p in candidates]
    squares = [torch.zeros_like(p) for p in candidates]
    for batch in batches:
        grads = torch.autograd.grad(model(**batch).loss, candidates)
        torch._foreach_add_(sums, grads)
        torch._foreach_addcmul_(squares, grads, grads)
    s, q = (torch.cat([x.flatten() for x in xs]) for xs in (sums, squares))
    # The root in float64, rounded: torch's vectorised float32 root is one bit off here and there.
    score = q if method == "piece-f" else s.abs() / (q + 1.0).double().sqrt().float()
    k = int(0.001 * sum(p.numel() for p in model.parameters()))
    order = torch.argsort(score, descending=True, stable=True)[:k]
    return order.sort().values


@pytest.mark.parametrize("method", ["piece-f", "piece-s"])
def test_selection_equals_ten_lines_of_torch(model_and_batches: Any, method: str) -> None:
    model, batches = model_and_batches
    chosen = estimate(model, batches, method, density=1e-3)
    offset, flat = 0, []
    for name, parameter in model.named_parameters():
        if "embed" in name:
            continue
        if name in chosen.indices:
            flat.append(chosen.indices[name] + offset)
        offset += parameter.numel()
    assert chosen.k == 134_515
    assert torch.equal(torch.cat(flat), plain_torch_selection(model, batches, method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_selected_weights_move(model_and_batches: Any, dtype: torch.dtype) -> None:
    original, batches = model_and_batches
    model = copy.deepcopy(original).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = estimate(model, batches, "piece-s", density=1e-3)
    wrapped = PieceModel(model, chosen)
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
    for batch in batches:
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = wrapped.unload()
    moved = 0
    for name, parameter in model.named_parameters():
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        differs = (parameter.detach().view(integers) != before[name].view(integers)).flatten()
        differs[chosen.indices.get(name, torch.empty(0, dtype=torch.int64))] = False
        assert not differs.any(), f"{name}: {int(differs.sum())} unselected weights changed"
        moved += int((parameter.detach() != before[name]).sum())
    assert moved > 0.9 * chosen.k


def test_selection_survives_the_disk(model_and_batches: Any, tmp_path: Path) -> None:
    model, batches = model_and_batches
    chosen = estimate(model, batches[:1], "piece-f", density=1e-3)
    chosen.save(tmp_path / "chosen.safetensors")
    again = Selection.load(tmp_path / "chosen.safetensors")
    again.check_fits(model)
    assert all(torch.equal(again.indices[name], chosen.indices[name]) for name in chosen.indices)
