"""bfloat16 accumulators: rounded at random, reproducibly, right in the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piece_ops.importance import Importance, estimate, rounding
from piece_ops.importance.budget import needs_of, peak_of
from piece_ops.importance.rounding import add_rounded_

from helpers.compare import assert_all_bits_equal
from helpers.model_zoo import words
from helpers.tiny_models import batch, llama
from helpers.tolerances import rounded_sum_error

BATCHES = [words(seed=1), words(seed=2)]


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def test_a_number_goes_to_one_of_its_neighbours_as_often_as_it_is_near() -> None:
    n, low, high = 1 << 16, 1.0, 1.0 + 2.0**-7
    for sign in (1.0, -1.0):
        for share in (0.0, 0.25, 0.9):
            value = torch.full((n,), sign * (low + share * (high - low)))
            got = torch.zeros(n, dtype=torch.bfloat16)
            add_rounded_(got, value, key=7)
            assert set(got.abs().tolist()) <= {low, high}
            # a share of n draws: four standard deviations
            spread = 4.0 * (share * (1.0 - share) / n) ** 0.5
            assert abs(float((got.abs() == high).float().mean()) - share) <= spread


def test_small_terms_are_not_lost_and_zeros_and_infinities_stay() -> None:
    total, terms = torch.ones(4096, dtype=torch.bfloat16), 512
    for step in range(terms):
        add_rounded_(total, torch.full((4096,), 2.0**-11), key=step * 77)
    assert abs(float(total.double().mean()) - 1.25) <= rounded_sum_error(terms, 1.25, 4096)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    kept = torch.zeros(4, dtype=torch.bfloat16)
    add_rounded_(kept, special, key=3)
    assert kept.tolist() == [0.0, 0.0, torch.inf, -torch.inf]


def test_random_bits_depend_on_key_and_position_only() -> None:
    value = torch.rand(300_000)  # longer than what is rounded at a time
    whole, same, other, front = (torch.zeros(value.shape, dtype=torch.bfloat16) for _ in range(4))
    add_rounded_(whole, value, key=1)
    add_rounded_(same, value, key=1)
    add_rounded_(other, value, key=2)
    add_rounded_(front[:1000], value[:1000], key=1)
    assert torch.equal(whole, same) and torch.equal(whole[:1000], front[:1000])
    assert 0.3 < float((whole != other).float().mean()) < 0.6  # 1/3 expected of uniform shares


@pytest.mark.parametrize("begin", [0, 12_345, 2**32 - 70_000])
@pytest.mark.parametrize("n", [0, 1, 1000, 300_001])
def test_the_kernel_has_the_bits_of_plain_torch(n: int, begin: int) -> None:
    torch.set_num_threads(2)
    value, before = torch.randn(n), torch.randn(n).bfloat16()
    wanted, got = before.clone(), before.clone()
    rounding._add_rounded_in_torch(wanted, value, 2**32 - 7, begin)
    assert add_rounded_(got, value, key=2**32 - 7, begin=begin) is False
    assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))
    assert n < 1000 or not torch.equal(got, (before.float() + value).bfloat16())


def test_what_is_not_finite_is_seen() -> None:
    largest = torch.finfo(torch.bfloat16).max
    for value in (torch.inf, -torch.inf, torch.nan, 1.5 * 2.0**127):
        target = torch.full((100,), largest).bfloat16()
        target[:50] = 0.0
        assert add_rounded_(target[:50], torch.ones(50), key=1) is False
        change = torch.zeros(50)
        change[49] = value
        assert add_rounded_(target[50:], change, key=1) is True
        assert target[98] == largest and not torch.isfinite(target[99])


@pytest.mark.parametrize("per_sample", [True, "loop", False])
@pytest.mark.parametrize("method", ["piece-f", "piece-s", "piece-g"])
def test_importance_with_half_the_bytes(method: str, per_sample: Any) -> None:
    model = llama(tied=True)
    settings: dict[str, Any] = {"embeddings": True, "per_sample": per_sample}
    if method == "piece-g":
        settings["reference"] = [batch(2, 6, seed=9)]
    exact, first, again, other = (
        Importance(model, method, accumulators=kind, seed=seed, **settings)
        for kind, seed in (("float32", 0), ("bfloat16", 0), ("bfloat16", 0), ("bfloat16", 1))
    )
    for importance in (exact, first, again, other):
        for one in BATCHES:
            importance.update(one)
    kind = "_sums" if method == "piece-g" else "_square_sums"
    wanted, got = getattr(exact, kind), getattr(first, kind)
    assert_all_bits_equal(getattr(again, kind), got)
    assert any(not torch.equal(got[n], getattr(other, kind)[n]) for n in got)
    folds = 2 if per_sample != "loop" else 8
    for name, tensor in wanted.items():
        assert got[name].dtype == torch.bfloat16
        # each fold moves a sum by less than one place of bfloat16 of what it was at most
        largest = float(tensor.abs().max())
        assert float((got[name].float() - tensor).abs().max()) <= folds * 2.0**-7 * largest * 4
    selection = first.select(k=60)
    budget = max(peak_of([need]) for need in needs_of(first).values())
    small = estimate(
        model, BATCHES, method, k=60, accumulators="bfloat16", memory_budget=budget, **settings
    )
    assert small.threshold == selection.threshold
    assert all(torch.equal(small.indices[n], i) for n, i in selection.indices.items())


def test_saved_statistics_go_on_with_the_same_bits(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "statistics.safetensors"
    whole, half = (Importance(model, "piece-s", accumulators="bfloat16", seed=5) for _ in range(2))
    for importance in (whole, half):
        importance.update(BATCHES[0])
    half.save(path)
    loaded = Importance.load(path, model)
    for importance in (whole, loaded):
        importance.update(BATCHES[1])
    assert_all_bits_equal(loaded._square_sums, whole._square_sums)
    assert_all_bits_equal(loaded._sums, whole._sums)


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulators must be 'float32' or 'bfloat16', got 'fp8'"):
        Importance(llama(), accumulators="fp8")
