"""Selecting again within a task, and keeping coordinates of earlier tasks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from piece_ops import PieceModel, Selection, SparseAdamW
from piece_ops.delta import Delta
from piece_ops.training import Encoder, Row, load_task, run
from piece_ops.training.train import train_task

from helpers.tiny_lm import COLOURS, quick, save_tiny, tiny_model, tiny_tokenizer, write_rows

SHAPES = {"weight": (3, 4), "bias": (3,)}


def chosen(**positions: list[int]) -> Selection:
    indices = {name: torch.tensor(places) for name, places in positions.items()}
    return Selection(indices, SHAPES, total=15)


def step(model: PieceModel, optimizer: SparseAdamW, x: torch.Tensor) -> None:
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_coordinates_keep_values_and_moments(dtype: torch.dtype) -> None:
    layer, x = torch.nn.Linear(4, 3).to(dtype), torch.randn(5, 4).to(dtype)
    first = PieceModel(layer, chosen(weight=[1, 4, 7], bias=[0]))
    optimizer = SparseAdamW(first.parameters(), lr=1e-3)
    for _ in range(3):
        step(first, optimizer, x)
    old, state = first.values.weight, optimizer.state[first.values.weight]
    first.unload()
    trained = layer.weight.detach().clone()
    second = PieceModel(layer, chosen(weight=[0, 4, 7, 9]))
    refreshed = SparseAdamW(second.parameters(), lr=1e-3)
    refreshed.carry_over(optimizer)
    new = second.values.weight
    assert torch.equal(new[1:3], old[1:])  # the float32 value, not the weight it was rounded to
    assert torch.equal(new[[0, 3]], trained.flatten()[[0, 9]].float())
    held = refreshed.state[new]
    assert held["step"] == 3
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(held[key][1:3], state[key][1:])
        assert held[key][[0, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(layer.weight, trained)
    step(second, refreshed, x)
    second.unload()
    changed = (layer.weight != trained).flatten().nonzero()[:, 0].tolist()
    assert set(changed) <= {0, 4, 7, 9} and {0, 9} & set(changed)


def test_a_weight_that_is_new_starts_at_step_zero() -> None:
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    first = PieceModel(layer, chosen(weight=[1]))
    optimizer = SparseAdamW(first.parameters(), lr=1e-3)
    step(first, optimizer, x)
    first.unload()
    second = PieceModel(layer, chosen(weight=[2], bias=[1]))
    refreshed = SparseAdamW(second.parameters(), lr=1e-3)
    refreshed.carry_over(optimizer)
    step(second, refreshed, x)
    assert refreshed.state[second.values.weight]["step"] == 2
    assert refreshed.state[second.values.bias]["step"] == 1


def test_the_same_selection_again_changes_nothing() -> None:
    torch.manual_seed(0)
    layers, x = [torch.nn.Linear(4, 3) for _ in range(2)], torch.randn(5, 4)
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, refreshes in zip(layers, (0, 2), strict=True):
        model = PieceModel(layer, chosen(weight=[1, 4, 7]))
        optimizer = SparseAdamW(model.parameters(), lr=1e-2)
        for i in range(3):
            step(model, optimizer, x)
            if i < refreshes:
                previous = optimizer
                model.unload()
                model = PieceModel(layer, chosen(weight=[1, 4, 7]))
                optimizer = SparseAdamW(model.parameters(), lr=1e-2)
                optimizer.carry_over(previous)
        model.unload()
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_a_refreshed_task_leaves_one_delta() -> None:
    encoder = Encoder(tiny_tokenizer(), "plain", 64)
    rows = encoder.encode_all([Row(*pair) for pair in COLOURS])
    model, base = tiny_model(), tiny_model()
    name = "model.layers.0.mlp.up_proj.weight"
    shape = tuple(model.get_parameter(name).shape)

    def select(start: int) -> Selection:
        return Selection({name: torch.arange(start, start + 8)}, {name: shape}, total=10**6)

    settings = quick(refresh=2, steps=6, lr=1e-2)
    trained = train_task(
        model, encoder, rows, "t", settings, select(0), reselect=lambda segment: select(4 * segment)
    )
    assert trained.delta is not None
    assert trained.delta.indices[name].tolist() == list(range(16))
    assert trained.delta.task == "t"
    trained.delta.apply_(base)
    for one, two in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.equal(one, two)
    trained.delta.revert_(model)
    assert all(map(torch.equal, model.parameters(), tiny_model().parameters()))


def test_earlier_tasks_keep_their_coordinates(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    paths = [write_rows(tmp_path / f"{name}.jsonl", COLOURS) for name in ("a", "b", "c")]
    tasks = [(load_task(path.stem, path), path) for path in paths]
    settings = quick(protect=True, refresh=2, steps=4)
    run(str(model), tasks, settings, tmp_path / "out", save=False, report=False, say=lambda _: None)
    held: list[set[tuple[str, int]]] = []
    for i, name in enumerate("abc", start=1):
        of_task: set[tuple[str, int]] = set()
        files = sorted((tmp_path / "out" / "selections").glob(f"{i}-{name}*"))
        assert len(files) == 2
        for file in files:
            for tensor, places in Selection.load(file).indices.items():
                of_task |= {(tensor, place) for place in places.tolist()}
        held.append(of_task)
        delta = Delta.load(tmp_path / "out" / "deltas" / f"{i}-{name}.safetensors")
        changed = {(n, int(p)) for n, places in delta.indices.items() for p in places}
        assert changed <= of_task
    for one, two in itertools.combinations(held, 2):
        assert not one & two


def test_a_refreshed_random_selection_is_another_one(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", COLOURS)
    settings = quick(method="random", refresh=1, steps=3)
    tasks = [(load_task("a", path), path)]
    run(
        str(save_tiny(tmp_path / "model")),
        tasks,
        settings,
        tmp_path / "out",
        save=False,
        report=False,
    )
    files = sorted((tmp_path / "out" / "selections").iterdir())
    chosen = [Selection.load(file).indices["model.layers.0.mlp.up_proj.weight"] for file in files]
    assert len(chosen) == 3
    for one, two in itertools.combinations(chosen, 2):
        assert one.shape != two.shape or not torch.equal(one, two)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_selections_are_refreshed_or_protected(method: str) -> None:
    with pytest.raises(ValueError, match=f"belong to methods that select, got method {method}"):
        quick(method=method, refresh=3)
    with pytest.raises(ValueError, match="belong to methods that select"):
        quick(method=method, protect=True)
    with pytest.raises(ValueError, match="refresh must be at least 1, got 0"):
        quick(refresh=0)
