"""The examples run on their tiny model, and an interrupted run ends with the same bits."""

from __future__ import annotations

import importlib
import re
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


def fall(printed: str) -> float:
    """By how much the evaluation loss fell, as the example says at its end."""
    before, after = re.findall(r"evaluation loss ([\d.]+) -> ([\d.]+)", printed)[-1]
    return float(before) - float(after)


def moved(delta: Delta) -> int:
    """How many coordinates hold another value than the base model."""
    return sum(int((delta.values[n] != delta.base_values[n]).sum()) for n in delta.indices)


@pytest.mark.parametrize("example", NEEDS, indirect=True)
def test_an_example_trains_saves_little_and_resumes(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    options = ["--density", "0.01", "--lr", "1e-2"]
    trained = example.main([*options, "--out", str(whole)])
    assert fall(capsys.readouterr().out) > 0.5  # nats, of 5.6
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
    assert moved(delta) > 0.9 * delta.k  # the rest is rounded away in bfloat16
    base, _ = sys.modules["shared"].load("tiny")
    loaded = PieceModel.from_pretrained(base, whole)
    for name, weight in trained.model.named_parameters():
        assert torch.equal(weight, loaded.model.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("example", NEEDS, indirect=True)
def test_an_example_on_smollm2(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.1 % of 135 M: checkpoints of at most 3 MB, beside the tokenizer that trl's trainer adds."""
    from demo.model import prepare_model

    folder = prepare_model(Path(__file__).parents[1] / ".cache")
    example.main(["--model", str(folder), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    files = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-6").iterdir()}
    added = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    small = sum(size for name, size in files.items() if name not in added)
    with capsys.disabled():
        last = printed.splitlines()[-1].replace(str(tmp_path), "out")
        print(f"\n{example.__name__}: {last}; without a tokenizer {small:,}")
    assert small <= 3e6
    assert fall(printed) > 0
    delta = Delta.from_pretrained(tmp_path)
    assert delta.k == 134_515 and moved(delta) > 0.5 * delta.k
