"""Delta: what PieceModel makes, its file, applying and reverting, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from piece_ops import Delta, PieceModel, Selection, SparseAdamW
from piece_ops.delta.fingerprint import fingerprint

from helpers.deltas import rewrite, same, select, snapshot, train
from helpers.tiny_models import MODELS, batch, llama


@pytest.mark.parametrize("kind", MODELS)
def test_the_delta_of_real_training_reverts_and_applies_bit_for_bit(kind: str) -> None:
    model = MODELS[kind]()
    base = snapshot(model)
    wrapped = PieceModel(model, select(model))
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
    for step in range(3):
        wrapped(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = wrapped.delta(task="three steps")
    optimizer.step()  # the delta is a copy: training may go on
    wrapped.unload()
    assert (delta.task, delta.method, delta.total) == (
        "three steps",
        "random",
        sum(map(Tensor.numel, base.values())),
    )
    assert 0 < delta.k <= select(model).k
    model.load_state_dict(base, strict=False)
    delta.apply_(model)
    trained = snapshot(model)
    for name, kept in trained.items():
        changed = (kept != base[name]).reshape(-1).nonzero().reshape(-1)
        assert torch.equal(changed, delta.indices.get(name, torch.empty(0, dtype=torch.int64)))
    delta.revert_(model)
    assert same(model, base)
    delta.apply_(model)
    assert same(model, trained)


def test_any_optimizer_is_synchronised_first() -> None:
    model = llama()
    base = snapshot(model)
    wrapped = PieceModel(model, select(model))
    optimizer = torch.optim.SGD((p for p in wrapped.parameters() if p.requires_grad), lr=1.0)
    wrapped(**batch()).loss.backward()
    optimizer.step()  # the weights do not hold the values yet
    delta = wrapped.delta()
    delta.revert_(wrapped.unload())
    assert same(model, base)


def test_all_selected_or_only_the_changed_coordinates() -> None:
    model = llama(dtype=torch.bfloat16)
    base = snapshot(model)
    wrapped = PieceModel(model, select(model))
    nothing = wrapped.delta()
    assert (nothing.k, nothing.indices) == (0, {})
    with torch.no_grad():
        next(p for p in wrapped.parameters() if p.requires_grad)[0] += 1.0
    few, every = wrapped.delta(), wrapped.delta(changed_only=False)
    assert few.k == 1 and every.k == wrapped.selection.k
    assert few.fingerprint == every.fingerprint == nothing.fingerprint
    wrapped.unload()
    trained = snapshot(model)
    for delta in (few, every):
        delta.revert_(model)
        assert same(model, base)
        delta.apply_(model)
        assert same(model, trained)


def test_names_of_base_and_parent() -> None:
    model = llama()
    model.config._name_or_path = "somebody/llama"
    first = train(model, seed=1, task="one")
    second = train(model, seed=2, task="two", parent=first, base="other")
    assert (first.base, first.parent) == ("somebody/llama", "")
    assert (second.base, second.parent) == ("other", first.digest)
    assert first.digest in f"{first.digest}" and "task='one'" in repr(first)


def test_a_cast_model_and_an_unloaded_one_have_no_delta() -> None:
    model = PieceModel(llama(), select(llama()))
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must keep the dtype .*float32, got torch.bfloat16 for"):
        model.delta()
    model.unload()
    with pytest.raises(RuntimeError, match="unloaded"):
        model.delta()


def test_a_copy_of_the_wrapper_has_its_own_delta() -> None:
    wrapped = PieceModel(llama(), select(llama()))
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        next(p for p in other.parameters() if p.requires_grad)[0] += 1.0
    assert (wrapped.delta().k, other.delta().k) == (0, 1)


# ------------------------------------------------------------------------------------------- file


@pytest.mark.parametrize("kind", MODELS)
def test_file_round_trip(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    delta = train(MODELS[kind](), task="a", base="b", parent="c" * 64)
    delta = replace(delta, tip="d" * 64)
    delta.save(path)
    loaded = Delta.load(path)
    for name in (
        "shapes",
        "dtypes",
        "fingerprint",
        "base",
        "method",
        "task",
        "parent",
        "tip",
        "k",
        "total",
    ):
        assert getattr(loaded, name) == getattr(delta, name)
    assert loaded.digest == delta.digest
    for part in ("indices", "values", "base_values"):
        assert list(getattr(loaded, part)) == list(getattr(delta, part))
        for name, tensor in getattr(delta, part).items():
            assert torch.equal(getattr(loaded, part)[name], tensor)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if kind == "llama bf16":
        stored = load_file(path)
        assert sum(t.numel() * t.element_size() for t in stored.values()) == 8 * delta.k


def test_bytes_on_disk_are_8_a_coordinate_and_a_header(tmp_path: Path) -> None:
    model = nn.Linear(1000, 100, bias=False).to(torch.bfloat16)
    sizes = []
    for density in (0.01, 0.5):
        delta = train(copy.deepcopy(model), density=density)
        delta.save(tmp_path / "a")
        sizes.append((delta.k, (tmp_path / "a").stat().st_size))
    (few, small), (many, large) = sizes
    assert large - small <= 8 * (many - few) + 16  # 16: longer decimal numbers in the header
    assert small <= 8 * few + 1200


def test_a_parameter_past_int32_and_an_empty_delta(tmp_path: Path) -> None:
    one = torch.ones(1, dtype=torch.bfloat16)
    shapes = {"big": (2**16, 2**16), "small.values": (3,)}
    dtypes = {name: torch.bfloat16 for name in shapes}
    indices = {"big": torch.tensor([2**31 + 7]), "small.values": torch.tensor([2])}
    held = {"big": one, "small.values": one}
    delta = Delta(indices, held, held, shapes, dtypes, "f")
    delta.save(tmp_path / "a")
    assert load_file(tmp_path / "a")["big.indices"].dtype == torch.int64
    assert load_file(tmp_path / "a")["small.values.indices"].dtype == torch.int32
    assert Delta.load(tmp_path / "a").indices["big"].tolist() == [2**31 + 7]
    Delta({}, {}, {}, shapes, dtypes, "f").save(tmp_path / "b")
    assert Delta.load(tmp_path / "b").k == 0


def test_files_of_version_1_are_read_and_keep_their_digest(tmp_path: Path) -> None:
    delta = train(llama(), task="mail", parent="c" * 64)
    delta.save(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="pt") as file:
        info = json.loads(file.metadata()["info"])
    del info["forms"], info["parameters"], info["tip"], info["sha256"]
    info["shapes"] = {name: list(shape) for name, shape in delta.shapes.items()}
    info["dtypes"] = dict.fromkeys(delta.shapes, "float32")
    tensors = load_file(tmp_path / "new")
    sha = hashlib.sha256(json.dumps(info, sort_keys=True, separators=(",", ":")).encode())
    for key, tensor in sorted(tensors.items()):
        sha.update(f"\n{key}\t{str(tensor.dtype)[6:]}\t{tensor.numel()}\n".encode())
        sha.update(tensor.numpy().tobytes())
    header = {"format": "piece_ops.delta", "version": "1"}
    info["sha256"] = sha.hexdigest()
    save_file(tensors, tmp_path / "old", {**header, "info": json.dumps(info)})
    loaded = Delta.load(tmp_path / "old")
    assert loaded.digest == sha.hexdigest() != delta.digest
    assert (loaded.shapes, loaded.dtypes) == (delta.shapes, delta.dtypes)
    assert (loaded.task, loaded.parent, loaded.tip) == ("mail", "c" * 64, "")
    loaded.save(tmp_path / "again")
    assert Delta.load(tmp_path / "again").digest == delta.digest
    info["task"] = "law"
    save_file(tensors, tmp_path / "old", {**header, "info": json.dumps(info)})
    with pytest.raises(ValueError, match="the SHA-256 of its content must be"):
        Delta.load(tmp_path / "old")


def test_a_form_without_a_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes and dtypes .* same names.*1 in one .*\['a'\]"):
        Delta({}, {}, {}, {"a": (2,)}, {}, "f")


def saved(tmp_path: Path) -> Path:
    """A delta of two coordinates in the file."""
    two = torch.tensor([1.0, 2.0])
    delta = Delta(
        {"a": torch.tensor([0, 3])}, {"a": two}, {"a": -two}, {"a": (2, 2)}, {"a": two.dtype}, "f"
    )
    delta.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must hold 'piece_ops.delta', got 'other'"),
        ({"version": "3"}, "must have format version 2, got '3'"),
        ({"version": "1"}, "header .* is incomplete: KeyError"),
        ({"info": "{"}, "the header .* cannot be read"),
        ({"info_forms": 3}, "header .* is incomplete"),
        ({"info_forms": []}, "header .* is incomplete"),
        ({"info_forms": [[]]}, "header .* is incomplete"),
        ({"info_parameters": {"a": "0"}}, "header .* is incomplete"),
        ({"info_parameters": {"b": 0}}, "every parameter needs its shape, got none for 'a'"),
        ({"info_forms": [["float32", 2, -2]]}, r"the shape of 'a' is \[2, -2\]"),
        ({"info_forms": [["nn", 2, 2]]}, "the dtype of 'a' is 'nn'"),
        ({"info_task": None}, "task is None"),
        ({"info_k": 5}, "damaged: k must be 2 like the content, got 5"),
        ({"info_total": 5}, "damaged: total must be 4 like the content, got 5"),
        ({"info_task": "x"}, "damaged: the SHA-256 of its content must be"),
        ({"info_sha256": ""}, "damaged: the SHA-256 of its content must be"),
        (
            {"tensors": {"a.indices": torch.tensor([3, 1])}},
            "'a' must be strictly increasing, got 1 of 2",
        ),
        ({"tensors": {"a.indices": torch.tensor([1, 1])}}, "strictly increasing, got 1 of 2"),
        (
            {"tensors": {"a.indices": torch.tensor([1, 4])}},
            r"in 0\.\.3, got 1\.\.4 \(1 of 2 outside",
        ),
        ({"tensors": {"a.indices": torch.tensor([-1, 2])}}, r"got -1\.\.2"),
        ({"tensors": {"a.indices": torch.tensor([0.0])}}, "'a.indices' must be int32 or int64"),
        ({"tensors": {"a.indices": torch.tensor([0])}}, "values of 'a' must have 1 elements"),
        ({"tensors": {"a.indices": None}}, r"indices and values .* got 1 in one .*\['a'\]"),
        ({"tensors": {"a.values": None}}, r"indices and values .* got 1 in one .*\['a'\]"),
        ({"tensors": {"a.base_values": None}}, r"indices and base_values .*\['a'\]"),
        ({"tensors": {"a.values": torch.ones(2).half()}}, "values of 'a' must be torch.float32"),
        ({"tensors": {"a.values": torch.ones(3)}}, "values of 'a' must have 2 elements"),
        ({"tensors": {"a.values": torch.tensor([1.0, 2.5])}}, "SHA-256"),
        ({"tensors": {"a.other": torch.ones(2)}}, "must be named"),
        ({"tensors": {"b.indices": torch.tensor([0])}}, "same names"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = saved(tmp_path)
    rewrite(path, **change)
    with pytest.raises(ValueError, match=rf"^piece_ops\.Delta\.load: .*{message}"):
        Delta.load(path)


def test_truncated_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            Delta.load(path)
    with pytest.raises(FileNotFoundError, match="wanted a file"):
        Delta.load(tmp_path / "none")
    Selection({"a": torch.tensor([0])}, {"a": (2,)}, 2).save(path)
    with pytest.raises(ValueError, match=r"must hold 'piece_ops\.delta', got"):
        Delta.load(path)


# ------------------------------------------------------------------------- applying and reverting


def test_the_wrong_base_is_refused_and_untouched() -> None:
    model = llama()
    delta = train(model, task="mail")
    delta.revert_(model)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.view(-1)[delta.indices[name][:3]] += 1.0
    kept = snapshot(model)
    with pytest.raises(
        ValueError,
        match=rf"base values .* 'mail', .* 3 of {delta.k} .*in 1 tensors \({name!r}: 3 of",
    ):
        delta.apply_(model)
    with pytest.raises(ValueError, match="must hold the changed values"):
        delta.revert_(model)
    assert same(model, kept)


def test_a_difference_elsewhere_is_refused_unless_told() -> None:
    model = llama()
    delta = train(model)
    delta.revert_(model)
    with torch.no_grad():
        model.model.norm.weight[_free(delta, "model.norm.weight")] += 1.0
    kept = snapshot(model)
    with pytest.raises(ValueError, match=r"differs outside the delta's coordinates .*strict=False"):
        delta.apply_(model)
    assert same(model, kept)
    delta.apply_(model, strict=False)
    with pytest.raises(ValueError, match="fingerprint"):
        delta.revert_(model)
    delta.revert_(model, strict=False)
    assert same(model, kept)


def _free(delta: Delta, name: str) -> int:
    """A position that the delta does not change."""
    return next(p for p in range(10**6) if p not in delta.indices[name].tolist())


def test_applied_twice_and_reverted_twice() -> None:
    model = llama()
    delta = train(model)
    with pytest.raises(ValueError, match=r"it is applied already\. Nothing was written"):
        delta.apply_(model)
    delta.revert_(model)
    with pytest.raises(ValueError, match=r"it is not applied\. Nothing was written"):
        delta.revert_(model)


def test_signed_zeros_and_nan_count_as_bits() -> None:
    model = nn.Linear(2, 2, bias=False)
    held = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    model.weight.data.copy_(held)
    wrapped = PieceModel(
        model, Selection({"weight": torch.tensor([0, 1, 2])}, {"weight": (2, 2)}, 4)
    )
    with torch.no_grad():
        wrapped.values.weight[0] = -0.0
    delta = wrapped.delta()
    wrapped.unload()
    assert delta.indices["weight"].tolist() == [0]
    delta.revert_(model)
    assert not model.weight[0, 0].signbit()
    with torch.no_grad():
        model.weight[0, 0] = -0.0
    with pytest.raises(ValueError, match="applied already"):
        delta.apply_(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: llama(tied=True), "got 1 that differ: 'lm_head.weight' is missing"),
        (lambda: llama(dtype=torch.bfloat16), "is bfloat16 .* and must be float32 .*and 16 more"),
        (lambda: nn.Sequential(llama()), "'model.embed_tokens.weight' is missing"),
        (lambda: llama().to("meta"), "must be loaded, got 'model.embed_tokens.weight' on the meta"),
        (lambda: PieceModel(llama(), select(llama())), "call its unload"),
        (lambda: PieceModel(llama(), select(llama())).model, "call its unload"),
    ],
)
def test_other_models_are_refused(make: Any, message: str) -> None:
    delta = train(llama())
    with pytest.raises(ValueError, match=message):
        delta.apply_(make())


def test_not_a_model_and_not_contiguous() -> None:
    delta = train(llama())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        delta.apply_({})  # type: ignore[arg-type]
    model = llama()
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match=r"must be contiguous, got strides .*'lm_head.weight'"):
        delta.apply_(model)


def test_the_context_reverts_also_after_an_exception() -> None:
    model = llama()
    delta = train(model)
    trained = snapshot(model)
    delta.revert_(model)
    base = snapshot(model)
    with delta.applied(model) as inside:
        assert inside is model and same(model, trained)
    assert same(model, base)
    with pytest.raises(KeyError), delta.applied(model):
        raise KeyError
    assert same(model, base)
    with pytest.raises(ValueError, match="applied already"), delta.applied(model):
        with delta.applied(model):
            pass
    assert same(model, base)


def test_stacked_tasks_revert_in_reverse_order_only() -> None:
    model = llama()
    states, deltas = [snapshot(model)], []
    for seed in range(3):
        deltas.append(train(model, seed=seed, task=f"t{seed}", parent=deltas[-1] if deltas else ""))
        states.append(snapshot(model))
    for wrong in deltas[:2]:
        with pytest.raises(ValueError, match="apply deltas in the order"):
            wrong.revert_(model)
    for delta, state in zip(reversed(deltas), reversed(states[:-1]), strict=True):
        delta.revert_(model)
        assert same(model, state)
    with pytest.raises(ValueError, match=rf"made on top of the delta {deltas[0].digest[:12]}"):
        deltas[1].apply_(model)
    for delta, state in zip(deltas, states[1:], strict=True):
        delta.apply_(model)
        assert same(model, state)


def test_version_counters_move_and_only_chosen_tensors_are_written() -> None:
    model = llama()
    wrapped = PieceModel(
        model, Selection({"lm_head.weight": torch.tensor([5])}, {"lm_head.weight": (61, 24)}, 10**6)
    )
    with torch.no_grad():
        wrapped.values.lm_head.weight[0] += 1
    delta = wrapped.delta()
    wrapped.unload()
    before = {name: p._version for name, p in model.named_parameters()}
    delta.revert_(model)
    moved = {name for name, p in model.named_parameters() if p._version != before[name]}
    assert moved == {"lm_head.weight"}


def test_float64_and_a_device_move() -> None:
    model = nn.Linear(3, 2).double()
    base = snapshot(model)
    positions, held = torch.tensor([1, 4]), model.weight.detach().view(-1)[[1, 4]]
    shapes = {"weight": (2, 3), "bias": (2,)}
    dtypes = {name: torch.float64 for name in shapes}
    delta = Delta(
        {"weight": positions},
        {"weight": held + 1},
        {"weight": held},
        shapes,
        dtypes,
        fingerprint(base, {}, {}),
    ).to("cpu")
    with delta.applied(model):
        assert torch.equal(model.weight.detach().view(-1)[[1, 4]], held + 1)
    assert same(model, base)
