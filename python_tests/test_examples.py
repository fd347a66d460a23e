"""The examples run on their tiny model, and an interrupted run ends with the same bits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from piece_ops.delta import Delta
from piece_ops.model import PieceModel

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"plain_loop": (), "accelerate_loop": ("accelerate",), "hf_trainer": ("accelerate",)}
NEEDS["trl_sft"] = ("accelerate", "trl", "datasets")


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of this name, imported as the script is run: from its own folder."""
    for package in NEEDS[request.param]:
        pytest.importorskip(package)
    if "accelerate" in NEEDS[request.param]:  # it remembers the precision of the process's first
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = importlib.import_module(request.param)
    yield found
    for name in (request.param, "shared"):
        sys.modules.pop(name, None)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "shared"}


@pytest.mark.parametrize("example", NEEDS, indirect=True)
def test_an_example_trains_saves_little_and_resumes(example: ModuleType, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    options = ["--density", "0.01", "--lr", "1e-2"]
    trained = example.main([*options, "--out", str(whole)])
    example.main([*options, "--out", str(half), "--steps", "4"])
    resumed = example.main([*options, "--out", str(half), "--resume"])
    again = dict(resumed.values.named_parameters())
    for name, values in trained.values.named_parameters():
        assert torch.equal(values, again[name]), name

    small = sum(path.stat().st_size for path in (whole / "checkpoint-6").iterdir())
    assert small < 60_000  # mostly random states and settings; the weights have 74 kB
    assert not list(whole.rglob("pytorch_model*"))

    delta = Delta.from_pretrained(whole)
    assert delta.task == "colours" and delta.k == trained.selection.k
    base, _ = sys.modules["shared"].load("tiny")
    loaded = PieceModel.from_pretrained(base, whole)
    for name, weight in trained.model.named_parameters():
        assert torch.equal(weight, loaded.model.get_parameter(name)), name
