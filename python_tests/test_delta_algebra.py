"""Deltas among themselves and between models: diff, overlap, then, records, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import piece_ops.delta.compare
from piece_ops import Delta, PieceModel, diff

from helpers.deltas import same, select, snapshot, train, two_tasks
from helpers.tiny_models import MODELS, llama


@pytest.mark.parametrize("kind", MODELS)
def test_diff_of_models_is_the_delta_of_the_training(kind: str) -> None:
    before, after = MODELS[kind](), MODELS[kind]()
    trained = train(after)
    found = diff(before, after)
    for part in ("indices", "values", "base_values"):
        assert list(getattr(found, part)) == list(getattr(trained, part))
        for name, tensor in getattr(trained, part).items():
            assert torch.equal(getattr(found, part)[name], tensor)
    assert (found.shapes, found.dtypes, found.fingerprint) == (
        trained.shapes,
        trained.dtypes,
        trained.fingerprint,
    )
    assert diff(after, after).k == 0
    found.apply_(before)
    assert same(before, snapshot(after))


def test_diff_of_folders_and_of_both_kinds(tmp_path: Path) -> None:
    before, after = llama(), llama()
    train(after)
    before.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    after.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    wanted = diff(before, after)
    for first, second in (
        (tmp_path / "a", tmp_path / "b"),
        (before, tmp_path / "b"),
        (str(tmp_path / "a"), after),
    ):
        found = diff(first, second, base="x")
        assert (found.k, found.fingerprint, found.base) == (wanted.k, wanted.fingerprint, "x")
        found.apply_(before)
        assert same(before, snapshot(after))
        found.revert_(before)


def test_diff_compares_bits_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_ops.delta.compare, "_CHUNK", 3)
    nan = float("nan")
    a, b = nn.Linear(10, 1, bias=False), nn.Linear(10, 1, bias=False)
    a.weight.data = torch.tensor([[0.0, nan, 1, 2, 3, 4, 5, 6, 7, 8]])
    b.weight.data = torch.tensor([[-0.0, nan, 1, 2, 3.5, 4, 5, 6, 7, nan]])
    assert diff(a, b).indices["weight"].tolist() == [0, 4, 9]


def test_diff_of_transposed_storage_goes_by_logical_position() -> None:
    a, b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.weight[1, 0] += 1
    b.weight.data = b.weight.data.t().contiguous().t()
    delta = diff(a, b)
    assert delta.indices["weight"].tolist() == [3]
    assert float(delta.values["weight"]) == float(b.weight[1, 0].detach())


def test_diff_refuses_other_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 1 that differ: 'lm_head.weight' is .* and missing"):
        diff(llama(), llama(tied=True))
    with pytest.raises(ValueError, match=r"got 21 that differ: 'model\.embed_tokens.weight' is"):
        diff(llama(), llama(dtype=torch.bfloat16))
    with pytest.raises(FileNotFoundError, match=r"piece_ops\.diff: wanted a model folder"):
        diff(tmp_path / "none", llama())
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        diff(tmp_path, llama())
    with pytest.raises(ValueError, match="wrapped"):
        diff(PieceModel(llama(), select(llama())), llama())
    for name, number in (("a", 1), ("b", 2)):
        save_file({"n": torch.tensor([number])}, tmp_path / name)
    with pytest.raises(TypeError, match=r"got torch\.int64 for 'n'"):
        diff(tmp_path / "a", tmp_path / "b")


# --------------------------------------------------------------------------- overlap, then, switch


def test_overlap_counts_shared_and_conflicting_coordinates() -> None:
    _, first, second, _ = two_tasks(shared=True)
    found = first.overlap(second)
    head = first.indices["lm_head.weight"].numel()
    assert (found.shared, found.jaccard) == (first.k, 1.0)
    assert found.conflicting == (head + 1) // 2
    assert found.rows[0].name == max(first.indices, key=lambda name: first.indices[name].numel())
    assert str(found).splitlines()[-1].split()[0] == "all"
    other = train(llama(), seed=9)
    both = first.overlap(other)
    for row in both.rows:
        a, b = (set(d.indices[row.name].tolist()) for d in (first, other))
        assert (row.first, row.second, row.shared) == (len(a), len(b), len(a & b))
    nothing = diff(llama(), llama())
    assert (nothing.overlap(nothing).jaccard, first.overlap(nothing).shared) == (0.0, 0)
    assert str(nothing.overlap(nothing)).split()[-5:] == ["all", "0", "0", "0", "0"]


def test_then_makes_one_delta_of_a_stack() -> None:
    model = llama()
    base = snapshot(model)
    first = train(model, seed=1, task="one")
    second = train(model, seed=2, task="two", parent=first)
    trained = snapshot(model)
    both = first.then(second)
    assert both.task == "one + two" and both.fingerprint == first.fingerprint
    assert both.k == first.k + second.k - first.overlap(second).shared
    both.revert_(model)
    assert same(model, base)
    both.apply_(model)
    assert same(model, trained)
    with pytest.raises(ValueError, match=r"got other base values at \d+ coordinates, in \d+ tens"):
        second.then(first)
    for function in (first.then, first.overlap):
        with pytest.raises(ValueError, match=r"the same parameters.* 1 that differ.* and missing"):
            function(train(llama(tied=True)))
        with pytest.raises(ValueError, match=r"the same parameters.* 21 that differ.*bfloat16"):
            function(train(llama(dtype=torch.bfloat16)))


def test_then_wants_the_next_delta_of_the_stack_also_without_shared_coordinates() -> None:
    model = llama()
    first = train(model, seed=1, density=0.02)
    second = train(model, seed=2, density=1e-3, parent=first)
    third = train(model, seed=3, density=1e-3, parent=second)
    trained = snapshot(model)
    assert not first.overlap(second).shared and not first.overlap(third).shared
    whole = first.then(second).then(third)
    assert whole.tip == third.digest == first.then(second.then(third)).tip
    whole.revert_(model)
    whole.apply_(model)
    assert same(model, trained)
    with pytest.raises(ValueError, match=f"got one made on top of the delta {second.digest[:12]}"):
        first.then(third)
    whole.revert_(model)
    beside = train(model, seed=2, density=1e-3)  # of the base, like the first one
    assert not first.overlap(beside).shared
    with pytest.raises(ValueError, match="got one made on the first one's own base"):
        first.then(beside)


def test_siblings_without_a_common_coordinate_apply_together() -> None:
    model, first, _, base = two_tasks(shared=False)
    other = train(model, seed=7)
    other.revert_(model)
    keep = {
        name: torch.isin(p, first.indices[name], invert=True) for name, p in other.indices.items()
    }
    parts: dict[str, Any] = {
        kind: {n: t[keep[n]] for n, t in getattr(other, kind).items() if keep[n].any()}
        for kind in ("indices", "values", "base_values")
    }
    disjoint = Delta(
        **parts, shapes=other.shapes, dtypes=other.dtypes, fingerprint=other.fingerprint
    )
    assert first.overlap(disjoint).shared == 0
    first.apply_(model)
    with pytest.raises(ValueError, match="fingerprint"):
        disjoint.apply_(model)
    disjoint.apply_(model, strict=False)
    first.revert_(model, strict=False)
    disjoint.revert_(model)
    assert same(model, base)


# ----------------------------------------------------------------------------------- other formats


def test_sparse_patches_hold_what_a_server_needs() -> None:
    model = llama(dtype=torch.bfloat16)
    base = snapshot(model)
    delta = train(model)
    for patch in delta.to_sparse_patches():
        assert list(patch) == ["name", "indices", "values", "full_shape"]
        assert patch["indices"].dtype == torch.int32 and patch["values"].dtype == torch.bfloat16
        weight = base[patch["name"]]
        assert patch["full_shape"] == tuple(weight.shape)
        weight.view(-1)[patch["indices"].long()] = patch["values"]
    assert same(model, base)


def test_the_table_names_counts_and_magnitudes() -> None:
    shapes, dtypes = {"w": (4, 5), "b": (3,)}, {"w": torch.bfloat16, "b": torch.bfloat16}
    now, before = torch.tensor([3.0, 1.0]).bfloat16(), torch.tensor([1.0, 2.0]).bfloat16()
    delta = Delta(
        {"w": torch.tensor([0, 9])},
        {"w": now},
        {"w": before},
        shapes,
        dtypes,
        "f",
        base="B",
        task="T",
    )
    shown = delta.show()
    (row,) = shown.rows
    assert (row.name, row.elements, row.changed, row.share, row.bytes) == ("w", 20, 2, 1.0, 16)
    assert (row.mean_change, row.largest_change, row.relative_change) == (1.5, 2.0, 1.0)
    text = str(shown)
    assert "task='T', k=2 of 23 (8.696 %), in 1 of 2 parameters" in text
    assert "base: B" in text and "content: 16 bytes" in text and "10.0000" in text
    empty = Delta({}, {}, {}, shapes, dtypes, "f")
    assert "k=0 of 23" in str(empty.show())
