"""Selection within a memory budget: the same bits as without, and within the budget indeed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from piece_ops.importance import Importance, candidates, estimate, rounding
from piece_ops.importance.budget import (
    Group,
    Need,
    RunningTop,
    bytes_of,
    groups_within,
    needs_of,
    peak_of,
)
from piece_ops.importance.statistics import Statistics
from piece_ops.selection import Selection

from helpers.model_zoo import ZOO, words
from helpers.tiny_models import batch, gpt2, llama

METHODS = ["piece-f", "piece-s", "piece-g", "gradient", "snip", "taylor"]
BATCHES = [words(seed=1), words(seed=2), batch(1, 6, seed=3)]


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def assert_identical(got: Selection, wanted: Selection) -> None:
    assert (got.k, got.total, got.method) == (wanted.k, wanted.total, wanted.method)
    assert got.threshold == wanted.threshold
    assert list(got.indices) == list(wanted.indices) and got.shapes == wanted.shapes
    for name, indices in wanted.indices.items():
        assert torch.equal(got.indices[name], indices), name


def needs(model: Any, method: str, **settings: Any) -> dict[str, int]:
    return bytes_of(Importance(model, method, **settings))


def all_needs(model: Any, method: str, **settings: Any) -> list[Need]:
    return list(needs_of(Importance(model, method, **settings)).values())


def groups(model: Any, budget: int, method: str, **settings: Any) -> list[Group]:
    return groups_within(needs_of(Importance(model, method, **settings)), budget)


def count_forwards(model: Any) -> list[int]:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a: seen.append(1))
    return seen


# -------------------------------------------------------------------------- the same selection


@pytest.mark.parametrize("per_sample", [True, "loop", False])
@pytest.mark.parametrize("method", METHODS)
def test_groups_choose_what_all_together_choose(method: str, per_sample: Any) -> None:
    model = llama(tied=True)
    settings: dict[str, Any] = {"embeddings": True, "per_sample": per_sample}
    if method == "piece-g":
        settings["reference"] = [words(seed=5), words(seed=6)]
    wanted = estimate(model, BATCHES, method, density=0.02, **settings)
    sizes = needs(model, method, **settings)
    for budget in (max(sizes.values()), sum(sizes.values()) // 2):
        assert len(groups(model, budget, method, **settings)) > 1
        got = estimate(model, BATCHES, method, density=0.02, memory_budget=budget, **settings)
        assert_identical(got, wanted)


@pytest.mark.parametrize("name", ZOO)
def test_every_model_family(name: str) -> None:
    make, data = ZOO[name]
    model, batches = make(), [data(seed=1), data(seed=2)]
    wanted = estimate(model, batches, density=0.01, embeddings=True)
    budget = max(needs(model, "piece-s", embeddings=True).values())
    got = estimate(model, batches, density=0.01, embeddings=True, memory_budget=budget)
    assert_identical(got, wanted)


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[:1]])
def test_equal_scores_are_ranked_by_position_in_the_model(batches: Any) -> None:
    """Embedding rows of words that do not occur score zero, in the first parameter and the last."""
    model = llama()
    importance = Importance(model, "piece-f", embeddings=True)
    for one in batches:
        importance.update(one)
    nonzero = sum(int((t > 0).sum()) for t in importance._square_sums.values())
    assert nonzero + 200 < importance.candidate_count
    for k in (nonzero + 100, importance.candidate_count):
        wanted = importance.select(k=k)
        budget = max(needs(model, "piece-f", embeddings=True).values())
        got = estimate(model, batches, "piece-f", k=k, embeddings=True, memory_budget=budget)
        assert_identical(got, wanted)


@pytest.mark.parametrize("method", ["piece-f", "piece-s", "snip", "taylor"])
def test_one_batch_needs_one_pass(method: str) -> None:
    model = gpt2()
    settings = {"embeddings": True}
    wanted = estimate(model, BATCHES[:1], method, density=0.02, **settings)
    each = needs_of(Importance(model, method, **settings)).values()
    budget = peak_of(each, one_pass=True)
    assert budget < peak_of(each)
    # Two rows together and alone, then all of them; with a little less, again for the tied weight.
    one = BATCHES[:1]
    for given, less, forwards in ((one, 0, 4), (iter(one), 0, 4), (one, 1, 5)):
        seen = count_forwards(model)
        got = estimate(model, given, method, density=0.02, memory_budget=budget - less, **settings)
        assert_identical(got, wanted)
        assert len(seen) == forwards


@pytest.mark.parametrize("rows", [1, 3])
def test_one_sample_or_one_batch_as_one_sample_needs_one_pass(rows: int) -> None:
    model, given = llama(), [batch(rows, 6, seed=3)]
    wanted = estimate(model, given, density=0.02, per_sample=False)
    budget = max(needs(model, "piece-s").values())
    seen = count_forwards(model)
    got = estimate(model, given, density=0.02, per_sample=False, memory_budget=budget)
    assert_identical(got, wanted)
    assert len(seen) == 1


def test_what_one_pass_does_not_cover_gets_its_own() -> None:
    model = llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * 10.0)
    wanted = estimate(model, BATCHES[:1], density=0.02)
    assert "model.layers.1.mlp.up_proj.weight" in wanted.indices
    budget = max(needs(model, "piece-s").values())
    assert_identical(estimate(model, BATCHES[:1], density=0.02, memory_budget=budget), wanted)


def test_references_of_every_kind(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "earlier.safetensors"
    stored = Importance(model, "piece-f")
    stored.update(words(seed=7))
    stored.save(path)
    for reference in ("self", [[words(seed=5)], "self", path, stored], [path], [stored]):
        settings = {"reference": reference, "reference_samples": 3, "reference_tokens": 5}
        wanted = estimate(model, BATCHES, "piece-g", density=0.02, **settings)
        sizes = needs(model, "piece-g", **settings)
        budget = max(max(sizes.values()), sum(sizes.values()) // 3)
        got = estimate(model, BATCHES, "piece-g", density=0.02, memory_budget=budget, **settings)
        assert_identical(got, wanted)


def test_excluded_positions_and_no_coordinates_at_all() -> None:
    model = llama()
    budget = max(needs(model, "piece-f").values())
    first = estimate(model, BATCHES, "piece-f", k=200)
    settings: dict[str, Any] = {"exclude_positions": first}
    wanted = estimate(model, BATCHES, "piece-f", k=300, **settings)
    for given in (BATCHES, BATCHES[:1]):
        wanted = estimate(model, given, "piece-f", k=300, **settings)
        got = estimate(model, given, "piece-f", k=300, memory_budget=budget, **settings)
        assert_identical(got, wanted)
        none = estimate(model, given, "piece-f", k=0, memory_budget=budget)
        assert none.k == 0 and none.indices == {}


def test_a_budget_that_holds_everything_changes_nothing() -> None:
    model = llama()
    seen = count_forwards(model)
    estimate(model, iter(BATCHES), density=0.02, memory_budget=10**9)
    assert len(seen) == 6  # three to try two rows together and alone, one for each batch
    assert_identical(
        estimate(model, BATCHES, density=0.02, memory_budget=10**9),
        estimate(model, BATCHES, density=0.02),
    )


# ------------------------------------------------------------------------------------- some rows


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a matrix are treated apart where they have as few as 100 elements."""
    monkeypatch.setattr(candidates, "_TOGETHER", 100)


def in_rows(model: Any, method: str, share: float, **settings: Any) -> int:
    """A budget of a share of the largest candidate, so that its rows come in several groups."""
    budget = int(share * max(need.sums for need in all_needs(model, method, **settings)))
    parts = [rows for group in groups(model, budget, method, **settings) for rows in group.values()]
    assert sum(rows is not None for rows in parts) > 1
    return budget


@pytest.mark.parametrize(
    ("per_sample", "accumulators"), [(True, "float32"), ("loop", "float32"), (True, "bfloat16")]
)
@pytest.mark.parametrize("method", METHODS)
def test_some_rows_at_a_time(
    method: str, per_sample: Any, accumulators: str, small_pieces: None
) -> None:
    """Of the tied embedding, whose sums are of products, of rows, and of both."""
    model = llama(tied=True)
    settings: dict[str, Any] = {
        "embeddings": True,
        "per_sample": per_sample,
        "accumulators": accumulators,
    }
    if method == "piece-g":
        settings["reference"] = [words(seed=5), words(seed=6)]
    wanted = estimate(model, BATCHES, method, density=0.02, **settings)
    for share in (0.7, 0.35):
        budget = in_rows(model, method, share, **settings)
        got = estimate(model, BATCHES, method, density=0.02, memory_budget=budget, **settings)
        assert_identical(got, wanted)


@pytest.mark.parametrize("one_batch", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_some_rows_of_every_model_family(name: str, one_batch: bool, small_pieces: None) -> None:
    make, data = ZOO[name]
    model, batches = make(), [data(seed=1)] if one_batch else [data(seed=1), data(seed=2)]
    wanted = estimate(model, batches, density=0.01, embeddings=True)
    budget = in_rows(model, "piece-s", 0.6, embeddings=True)
    got = estimate(model, batches, density=0.01, embeddings=True, memory_budget=budget)
    assert_identical(got, wanted)


def test_some_rows_of_references_and_of_what_is_excluded(
    tmp_path: Path, small_pieces: None
) -> None:
    model, path = llama(tied=True), tmp_path / "earlier.safetensors"
    stored = Importance(model, "piece-f", embeddings=True)
    stored.update(words(seed=7))
    stored.save(path)
    settings: dict[str, Any] = {"embeddings": True, "reference": ["self", path, stored]}
    settings |= {"reference_samples": 3, "reference_tokens": 5}
    budget = in_rows(model, "piece-g", 0.5, **settings)
    first = estimate(model, BATCHES, "piece-f", k=200, embeddings=True)
    assert len(first.indices["model.embed_tokens.weight"]) > 20
    for excluded in (None, first):
        settings["exclude_positions"] = excluded
        wanted = estimate(model, BATCHES, "piece-g", density=0.02, **settings)
        got = estimate(model, BATCHES, "piece-g", density=0.02, memory_budget=budget, **settings)
        assert_identical(got, wanted)


def test_rows_are_ranked_by_position_in_the_model(small_pieces: None) -> None:
    """Rows of words that do not occur score zero."""
    model = llama()
    settings: dict[str, Any] = {"embeddings": True, "include": "model.embed_tokens.weight"}
    budget = in_rows(model, "piece-f", 0.3, **settings)
    count = model.model.embed_tokens.weight.numel()
    few = [batch(1, 6, seed=3), batch(1, 6, seed=4)]
    for k in (count // 2, count):
        wanted = estimate(model, few, "piece-f", k=k, **settings)
        assert wanted.threshold == 0.0
        got = estimate(model, few, "piece-f", k=k, memory_budget=budget, **settings)
        assert_identical(got, wanted)


def test_rows_that_belong_together_are_aligned() -> None:
    assert candidates.rows_together(torch.empty(49152, 576, device="meta")) == 7232
    assert candidates.rows_together(torch.empty(9, 2**20, 3, device="meta")) == 1
    assert candidates.rows_together(torch.empty(100, 2**17, device="meta")) == 32


# ------------------------------------------------------------------------------------- memory


def test_what_is_complete_waits_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    merge, calls = RunningTop.merge, []

    def watched(self: RunningTop, given: Any) -> None:
        calls.append(len(next(iter(given.values()))))
        merge(self, given)

    monkeypatch.setattr(RunningTop, "merge", watched)
    model = gpt2()
    wanted = estimate(model, BATCHES[:1], density=0.02)
    needs = needs_of(Importance(model, "piece-s")).values()
    least, total = peak_of(needs, one_pass=True), sum(need.sums for need in needs)
    for room, most in ((0, len(needs)), (total // 4, 5)):
        calls.clear()
        got = estimate(model, BATCHES[:1], density=0.02, memory_budget=least + room)
        assert_identical(got, wanted)
        assert 1 < len(calls) <= most
        assert sum(calls) == len(needs)


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[:1]])
@pytest.mark.parametrize("accumulators", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "mixtral"])
def test_accumulators_stay_within_the_budget(
    name: str, batches: Any, accumulators: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float32 sums that are rounded into bfloat16 ones, too."""
    alive = {"now": 0, "most": 0}

    def count(tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        alive["now"] += size
        alive["most"] = max(alive["most"], alive["now"])
        weakref.finalize(tensor, lambda: alive.update(now=alive["now"] - size))
        return tensor

    zero, zeros_for = Statistics._zero, rounding._zeros_for
    monkeypatch.setattr(Statistics, "_zero", lambda self, name: count(zero(self, name)))
    monkeypatch.setattr(rounding, "_zeros_for", lambda stored: count(zeros_for(stored)))
    model = ZOO[name][0]()
    settings = {"accumulators": accumulators, "embeddings": True}
    needs = needs_of(Importance(model, "piece-s", **settings)).values()
    assert any(need.passing for need in needs) == (accumulators == "bfloat16")
    least = max(peak_of([need]) for need in needs)
    monkeypatch.setattr(candidates, "_TOGETHER", 100)
    for budget in (least // 2, least, (peak_of(needs) + least) // 2):
        estimate(model, batches, density=0.02, memory_budget=budget, **settings)
        assert 0 < alive["most"] <= budget and alive["now"] == 0
        alive["most"] = 0


# ------------------------------------------------------------------------------------- errors


class Changing:
    """One sample less every time."""

    def __init__(self) -> None:
        self.rows = 5

    def __iter__(self) -> Iterator[Any]:
        self.rows -= 1
        return iter([batch(self.rows, 6), batch(1, 6)])


def test_a_budget_below_the_fewest_rows_is_refused(small_pieces: None) -> None:
    least = r"at least 768 bytes \(the accumulators of 4 rows of 'model\.embed_tokens\.weight'"
    with pytest.raises(ValueError, match=least + ".*got 767"):
        estimate(llama(), BATCHES, embeddings=True, memory_budget=767)


def test_bad_budgets_and_batches_are_refused() -> None:
    model = llama()
    sizes = needs(model, "piece-s")
    largest = max(sizes.values())
    with pytest.raises(ValueError, match=rf"at least {largest} bytes .*lm_head.*got {largest - 1}"):
        estimate(model, BATCHES, memory_budget=largest - 1)
    with pytest.raises(TypeError, match="iterated again, got a one-shot list_iterator"):
        estimate(model, iter(BATCHES), memory_budget=largest)
    with pytest.raises(TypeError, match="reference must be a sequence"):
        estimate(
            model,
            BATCHES,
            "piece-g",
            reference=iter(BATCHES),
            memory_budget=max(needs(model, "piece-g").values()),
        )
    with pytest.raises(ValueError, match="the same in every pass, got 3 and 4 of them"):
        estimate(model, Changing(), memory_budget=largest)
    with pytest.raises(ValueError, match="must hold samples"):
        estimate(model, [], memory_budget=largest)
    with pytest.raises(ValueError, match=r"k must be in 0\.\."):
        estimate(model, BATCHES, k=10**9, memory_budget=largest)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="memory_budget must be"):
            estimate(model, BATCHES, memory_budget=wrong)
