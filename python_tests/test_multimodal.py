"""Vision-language models, one part frozen: what is selected, what moves, what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from piece_ops.delta import Delta
from piece_ops.importance import estimate
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW

from helpers.tiny_vision import TOWER, VISION_MODELS, sample

PARTS = ("vision", "language")


def freeze(model: nn.Module, tower: str, part: str) -> set[str]:
    """Freeze the vision tower or all but that; the names of the frozen parameters."""
    frozen = set()
    for name, parameter in model.named_parameters():
        if (f".{tower}." in name) == (part == "vision"):
            parameter.requires_grad_(False)
            frozen.add(name)
    return frozen


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(first: dict[str, Tensor], second: nn.Module) -> None:
    for name, weight in second.named_parameters():
        assert torch.equal(first[name], weight), name


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", VISION_MODELS)
def test_a_part_trains_and_its_delta_is_applied_and_reverted(
    kind: str, part: str, tmp_path: Path
) -> None:
    model = VISION_MODELS[kind]()
    frozen = freeze(model, TOWER[kind], part)
    assert 10 < len(frozen) < len(list(model.parameters())) - 10
    samples = [sample(model, seed, pad=seed % 2) for seed in range(6)]
    before = weights_of(model)

    selection = estimate(model, samples, "piece-f", density=0.01)
    assert not frozen & set(selection.indices)
    wrapped = PieceModel(model, selection)
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        for one in samples:
            loss = wrapped(**one).loss / len(samples)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-6:]) < sum(losses[:6])

    moved = 0
    for name, weight in model.named_parameters():
        changed = torch.nonzero((weight != before[name]).flatten()).flatten()
        moved += changed.numel()
        if changed.numel():
            assert bool(torch.isin(changed, selection.indices[name]).all()), name
    assert moved > 0.9 * selection.k

    wrapped.delta(task="squares").save(tmp_path / "delta.safetensors")
    plain = wrapped.unload()
    after = weights_of(plain)
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert delta.k == moved
    delta.revert_(plain)
    assert_same(before, plain)
    other = VISION_MODELS[kind]()
    delta.apply_(other)
    assert_same(after, other)
    assert {n for n, p in plain.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_the_image_matters_and_gradients_are_those_of_dense_training(kind: str) -> None:
    model = VISION_MODELS[kind]()
    one = sample(model, 1)
    assert model(**one).loss != model(**{**one, "pixel_values": one["pixel_values"] * 0}).loss
    model(**one).loss.backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    selection = estimate(model, [one], "gradient", density=0.02)
    assert any(f".{TOWER[kind]}." in name for name in selection.indices)
    wrapped = PieceModel(model, selection)
    wrapped(**one).loss.backward()
    for name, values in wrapped.values.named_parameters():
        wanted = dense[name].flatten()[selection.indices[name]]
        torch.testing.assert_close(values.grad, wanted)


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_a_batch_of_several_images_trains_like_its_samples(kind: str) -> None:
    model = VISION_MODELS[kind]()
    samples = [sample(model, seed) for seed in range(3)]
    batch = {key: torch.cat([one[key] for one in samples]) for key in samples[0]}
    wrapped = PieceModel(model, estimate(model, samples, "piece-f", density=0.02))
    for one in samples:  # with as many labels each
        (wrapped(**one).loss / 3).backward()
    wanted = {name: p.grad.clone() for name, p in wrapped.values.named_parameters()}
    wrapped.zero_grad()
    wrapped(**batch).loss.backward()
    for name, values in wrapped.values.named_parameters():
        torch.testing.assert_close(values.grad, wanted[name])


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_generate_sees_the_image(kind: str) -> None:
    model = VISION_MODELS[kind]()
    one = sample(model, 0)
    del one["labels"]
    wrapped = PieceModel(model, estimate(model, method="magnitude", density=0.01))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = wrapped.generate(**one, **settings)
    assert tokens.shape[1] > one["input_ids"].shape[1]
    assert torch.equal(wrapped.unload().generate(**one, **settings), tokens)
