"""Selection: its file, its report, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from piece_ops.selection import Selection, split_name

from helpers.tiny_models import gpt2, llama, random_positions


def some_selection(model: nn.Module | None = None) -> Selection:
    model = llama() if model is None else model
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    return Selection(random_positions(model, 0.05), shapes, total, "piece-f", 0.125)


def test_counts_and_text() -> None:
    chosen = Selection({"a": torch.tensor([0, 3])}, {"a": (2, 2), "b": (3,)}, 10, "random", 0.5)
    assert (chosen.k, chosen.total, chosen.density, chosen.candidates) == (2, 10, 0.2, 7)
    assert "k=2 of 10 (20 %), in 1 of 2 parameters" in repr(chosen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.total = 3  # type: ignore[misc]


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "chosen.safetensors"
    chosen = some_selection()
    chosen.save(path)
    loaded = Selection.load(path)
    assert list(loaded.indices) == list(chosen.indices)
    for name, positions in chosen.indices.items():
        assert loaded.indices[name].dtype == torch.int64
        assert torch.equal(loaded.indices[name], positions)
    for field in ("shapes", "total", "method", "threshold", "k"):
        assert getattr(loaded, field) == getattr(chosen, field)
    assert all(tensor.dtype == torch.int32 for tensor in load_file(path).values())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_an_empty_selection_and_a_huge_parameter_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "chosen.safetensors"
    Selection({}, {"a": (3,)}, 3, threshold=math.inf).save(path)
    loaded = Selection.load(path)
    assert (loaded.k, loaded.indices, loaded.threshold) == (0, {}, math.inf)
    both = torch.tensor([1, 2**31 + 7, 5, 6])  # slices of one tensor, as a top-k returns them
    shapes = {"big": (2**16, 2**16), "small": (10,)}
    Selection({"big": both[:2], "small": both[2:]}, shapes, 2**32 + 10).save(path)
    assert load_file(path)["big.indices"].dtype == torch.int64
    assert Selection.load(path).indices["big"].tolist() == [1, 2**31 + 7]
    assert math.isnan(Selection.load(path).threshold)


def rewrite(path: Path, tensors: dict[str, Any] | None = None, **header: Any) -> None:
    """Change tensors or header fields of a selection file (info fields: ``info_<name>``)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        metadata = dict(handle.metadata())
    info = json.loads(metadata["info"])
    for key, value in header.items():
        if key.startswith("info_"):
            info[key.removeprefix("info_")] = value
        else:
            metadata[key] = value
    metadata.setdefault("info", json.dumps(info))
    if "info" not in header:
        metadata["info"] = json.dumps(info)
    save_file({**load_file(path), **(tensors or {})}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must hold 'piece_ops.selection', got 'other'"),
        ({"version": "2"}, "must have format version 1, got '2'"),
        ({"info": "{"}, "the header .* cannot be read"),
        ({"info": "[]"}, "must be a JSON object"),
        ({"info_shapes": 3}, "header .* is incomplete"),
        ({"info_k": 5}, "must hold 5 positions, got 2"),
        ({"info_total": 1}, "total must be at least 4"),
        ({"tensors": {"a.indices": torch.tensor([3, 1])}}, "damaged: .*strictly increasing"),
        ({"tensors": {"a.indices": torch.tensor([1, 1])}}, "damaged: .*strictly increasing"),
        ({"tensors": {"a.indices": torch.tensor([1, 4])}}, r"damaged: .*in 0\.\.3, got 1\.\.4"),
        ({"tensors": {"a.indices": torch.tensor([-1, 2])}}, r"got -1\.\.2"),
        ({"tensors": {"b.indices": torch.tensor([0])}}, "needs its shape, got none for 'b'"),
        ({"tensors": {"a.values": torch.tensor([0])}}, "named '<parameter>.indices'"),
        ({"tensors": {"a.indices": torch.tensor([0.0])}}, "got torch.float32 'a.indices'"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "chosen.safetensors"
    Selection({"a": torch.tensor([0, 3])}, {"a": (2, 2)}, 10).save(path)
    rewrite(path, **change)
    with pytest.raises(ValueError, match=rf"^piece_ops\.Selection\.load: .*{message}"):
        Selection.load(path)


def test_truncated_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chosen.safetensors"
    some_selection().save(path)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            Selection.load(path)
    with pytest.raises(FileNotFoundError, match="wanted a file"):
        Selection.load(tmp_path / "none")
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="got None"):
        Selection.load(path)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ({"a": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "int64 tensor, got torch.int3"),
        ({"a": [0, 1]}, TypeError, "must be an int64 tensor, got list"),
        ({"a": torch.tensor([[0, 1]])}, ValueError, r"one dimension, got \[1, 2\]"),
        ({"a": torch.tensor([], dtype=torch.int64)}, ValueError, "got none for 'a'; leave it out"),
        ({"a": torch.tensor([2, 1])}, ValueError, "strictly increasing"),
        ({"a": torch.tensor([2, 4])}, ValueError, r"in 0\.\.3, got 2\.\.4"),
        ({"c": torch.tensor([0])}, ValueError, "needs its shape"),
    ],
)
def test_bad_positions_are_refused(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Selection(indices, {"a": (4,)}, 4)


def test_check_fits_names_what_is_missing_and_both_shapes() -> None:
    chosen = some_selection()
    chosen.check_fits(llama())
    other = llama()
    other.lm_head = nn.Linear(24, 5, bias=False)
    del other.model.layers[1]
    with pytest.raises(ValueError) as caught:
        chosen.check_fits(other)
    text = str(caught.value)
    assert "9 names it lacks: 'model.layers.1.self_attn.q_proj.weight'" in text
    assert "and 4 more" in text
    assert "1 other shapes: 'lm_head.weight' is [5, 24] in the model and [61, 24] here" in text


def test_a_candidate_without_chosen_positions_need_not_be_in_the_model() -> None:
    chosen = Selection({"a": torch.tensor([0])}, {"a": (2,), "gone": (3,)}, 5)
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2))})
    chosen.check_fits(model)


@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_report_counts_by_layer_and_module(model: nn.Module) -> None:
    chosen = some_selection(model)
    report = chosen.report()
    for rows in (report.by_layer, report.by_module):
        assert sum(row.chosen for row in rows) == chosen.k
        assert sum(row.elements for row in rows) == chosen.candidates
        assert sum(row.share for row in rows) == pytest.approx(1.0)
        assert sum(row.parameters for row in rows) == len(chosen.shapes)
    prefix = "model.layers" if hasattr(model, "model") else "transformer.h"
    assert [row.group for row in report.by_layer] == [f"{prefix}.0", f"{prefix}.1", "(no layer)"]
    first = report.by_layer[0]
    inside = [name for name in chosen.shapes if name.startswith(f"{prefix}.0.")]
    assert first.chosen == sum(chosen.indices[name].numel() for name in inside)
    assert first.density == first.chosen / sum(math.prod(chosen.shapes[n]) for n in inside)
    groups = {row.group for row in report.by_module}
    wanted = "self_attn.v_proj.weight" if hasattr(model, "model") else "attn.c_attn.weight"
    assert wanted in groups and wanted in str(report) and "density %" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["by_layer"][0]["chosen"] == first.chosen
    assert [r.chosen for r in report.by_module] == sorted(
        (r.chosen for r in report.by_module), reverse=True
    )


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3", "mlp.up_proj.weight"),
        ("layers.3.experts.7.w1", "layers.3", "experts.*.w1"),
        ("lm_head.weight", "", "lm_head.weight"),
        ("blocks.0", "blocks.0", "blocks"),
        ("0.weight", "0", "weight"),
    ],
)
def test_names_are_split_at_their_first_number(name: str, layer: str, kind: str) -> None:
    assert split_name(name) == (layer, kind)


def test_report_of_an_empty_selection() -> None:
    report = Selection({}, {"a": (3,)}, 3).report()
    assert report.by_layer[0].share == 0.0 and "(no layer)" in str(report)
