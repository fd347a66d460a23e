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
from torch.nn import functional as F

from piece_ops import Importance, PieceModel, Selection, SparseAdamW, estimate
from piece_ops.importance.budget import groups_within, needs_of

from helpers.per_sample import clear_k

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


def pad(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All rows in one batch."""
    length = max(one["input_ids"].shape[1] for one in batches)
    padding = [length - one["input_ids"].shape[1] for one in batches]
    fill = {"input_ids": 0, "labels": -100}
    padded = {
        key: torch.cat(
            [F.pad(one[key], (0, n), value=v) for one, n in zip(batches, padding, strict=True)]
        )
        for key, v in fill.items()
    }
    lengths = length - torch.tensor(padding)
    padded["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    return padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_batched_pass_selects_what_the_loop_does(
    model_and_batches: Any, dtype: torch.dtype
) -> None:
    """In float32 but for coordinates that lie on the threshold; in bfloat16 nearly."""
    original, batches = model_and_batches
    model, padded = copy.deepcopy(original).to(dtype), pad(batches)
    batched, loop = Importance(model), Importance(model, per_sample="loop")
    for importance in (batched, loop):
        importance.update(padded)
    assert batched.looped == {} and batched.sample_count == len(batches)
    got, wanted = batched.select(density=1e-3), loop.select(density=1e-3)
    common = 0
    for name, positions in wanted.indices.items():
        mine = got.indices.get(name, torch.empty(0, dtype=torch.int64))
        both = torch.isin(mine, positions)
        common += int(both.sum())
        if dtype == torch.float32:
            scores = loop._square_sums[name].flatten()[mine[~both]] / loop.sample_count
            torch.testing.assert_close(scores, torch.full_like(scores, wanted.threshold))
    assert common >= (0.9999 if dtype == torch.float32 else 0.98) * wanted.k


@pytest.mark.parametrize("method", ["piece-s", "piece-g"])
def test_a_tenth_of_the_sums_selects_the_same(model_and_batches: Any, method: str) -> None:
    """The tied embedding, 21 % of the candidates, goes by rows."""
    model, batches = model_and_batches
    settings: dict[str, Any] = {"embeddings": True}
    if method == "piece-g":
        settings["reference"] = [pad(batches[2:])]
    given = [pad(batches), pad(batches[:2])]
    needs = needs_of(Importance(model, method, **settings))
    budget = sum(need.sums for need in needs.values()) // 10
    parts = [rows for group in groups_within(needs, budget) for rows in group.values()]
    assert sum(rows is not None for rows in parts) >= 3
    wanted = estimate(model, given, method, **settings)
    got = estimate(model, given, method, memory_budget=budget, **settings)
    assert "model.embed_tokens.weight" in wanted.indices
    assert got.threshold == wanted.threshold and list(got.indices) == list(wanted.indices)
    assert all(torch.equal(got.indices[name], wanted.indices[name]) for name in wanted.indices)


def test_a_tied_embedding_gets_its_cross_terms(model_and_batches: Any) -> None:
    """Input embedding and output head are one weight: the same selection as the loop's."""
    model, batches = model_and_batches
    batched, loop = (Importance(model, embeddings=True, per_sample=how) for how in (True, "loop"))
    for importance in (batched, loop):
        importance.update(pad(batches))
    assert batched.looped == {}
    k = clear_k(loop, 1000)
    got, wanted = batched.select(k=k), loop.select(k=k)
    assert "model.embed_tokens.weight" in wanted.indices
    assert list(got.indices) == list(wanted.indices)
    assert all(torch.equal(got.indices[name], wanted.indices[name]) for name in wanted.indices)
