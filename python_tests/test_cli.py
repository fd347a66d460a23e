"""The command line: what it prints, what it refuses, and with which status it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import piece_ops
from piece_ops import cli
from piece_ops.selection import Selection
from piece_ops.training.output import OutputError, RunFolder

from helpers.tiny_lm import save_tiny, write_rows

ROWS = [(f"{name}?", kind) for name in "abcdefghij" for kind in ("red", "blue")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def task(tmp_path: Path) -> str:
    return f"one={write_rows(tmp_path / 'one.jsonl', ROWS)}"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must end with status 2 and one line; return the line."""
    try:
        status = cli.main(arguments)
    except SystemExit as left:  # argparse leaves this way
        assert isinstance(left.code, int)
        status = left.code
    captured = capsys.readouterr()
    # Bars of other libraries may stand before; ours is the last line and the only one of words.
    lines = [line for line in captured.err.splitlines() if line.startswith("piece-ops")]
    assert status == 2
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


QUICK = ("--steps", "2", "--batch-size", "4", "--importance-rows", "2", "--density", "0.01")


def test_train_then_eval_and_train_on(
    model: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "words.txt"
    text.write_text("words that stand for everything else the model knows")
    out = tmp_path / "out"
    command = ["train", "--model", model, "--task", task, "--general", f"words={text}"]
    command += [*QUICK, "--reference-rows", "2", "--reference-tokens", "5", "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "piece-g, 2" in printed and "learned and forgotten" in printed and "words" in printed
    assert json.loads((out / "results.json").read_text())["settings"]["method"] == "piece-g"
    assert "--overwrite to replace it" in fails(capsys, *command)
    assert cli.main([*command, "--overwrite", "--no-save-model"]) == 0
    assert not (out / "model").exists()
    assert cli.main([*command, "--overwrite"]) == 0
    capsys.readouterr()

    numbers = tmp_path / "numbers.json"
    command = ["eval", "--model", str(out / "model"), "--task", task, "--general", f"w={text}"]
    assert cli.main([*command, "--out", str(numbers)]) == 0
    assert "perplexity" in capsys.readouterr().out
    found = json.loads(numbers.read_text())
    results = json.loads((out / "results.json").read_text())
    assert found["tasks"]["one"]["loss"] == pytest.approx(results["loss"][1][0], rel=1e-5)
    assert found["general_loss"]["w"] == pytest.approx(results["general_loss"][1][0], rel=1e-5)


def test_select_saves_and_reports(
    model: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "chosen.safetensors"
    command = ["select", "--model", model, "--task", task, "--method", "piece-f"]
    assert cli.main([*command, "--density", "0.01", "--out", str(out)]) == 0
    assert "model.layers.1" in capsys.readouterr().out
    chosen = Selection.load(out)
    assert chosen.method == "piece-f"
    few = tmp_path / "within.safetensors"  # several passes, the same coordinates
    budget = [
        "--memory-budget",
        str(4 * max(torch.Size(s).numel() for s in chosen.shapes.values())),
    ]
    assert cli.main([*command, "--density", "0.01", "--out", str(few), *budget]) == 0
    assert all(torch.equal(i, chosen.indices[n]) for n, i in Selection.load(few).indices.items())
    capsys.readouterr()
    line = fails(capsys, *command, "--memory-budget", "1")
    assert "memory_budget must be at least" in line
    line = fails(capsys, *command, "--task", task.replace("one=", "two="))
    assert "wanted one --task, got 2" in line
    line = fails(capsys, *command, "--out", str(tmp_path / "no" / "chosen.safetensors"))
    assert "there is no folder" in line


def test_info_says_what_the_build_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in (piece_ops.__version__, "torch", "instruction set", "CUDA kernels", "GPU"):
        assert word in printed


def test_without_file_locks_all_but_a_run_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; sys.modules.update(fcntl=None, resource=None)\n"  # as on Windows
        "from piece_ops.cli import main; sys.exit(main(['info']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OutputError, match="needs the file locks of Linux or macOS"):
        RunFolder(tmp_path / "out").__enter__()


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "piece_ops", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"piece_ops {piece_ops.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["teach"], "invalid choice: 'teach'"),
        (["train", "--model", "m"], "required: --task, --out"),
        (["train", "--method", "best"], "invalid choice: 'best'"),
        (["train", "--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["select", "--method", "full"], "invalid choice: 'full'"),
        (["info", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "2"], "density must be above 0 and at most 1, got 2.0"),
        (["--density", "0"], "density must be above 0"),
        (["--lr", "0"], "lr must be a finite number above 0, got 0.0"),
        (["--steps", "3", "--epochs", "1"], "wanted steps or epochs, got both"),
        (["--task", "two"], "--task: wanted NAME=PATH, got 'two'"),
        (["--task", "two=none.jsonl"], "task two: there is no file or folder none.jsonl"),
        (["--general", "words"], "--general: wanted NAME=PATH, got 'words'"),
        (["--general", "w=none.txt"], "none.txt: there is no such file"),
        (["--prompt-format", "chat"], "needs a chat template"),
        (["--model", "./none"], "model ./none: wanted a folder or a hub id, got no such folder"),
        (["--reference", "x"], "--reference: wanted NAME=PATH, got 'x'"),
        (["--xi", "1"], "xi belongs to piece-s, got method piece-g"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, got 'int8'"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_bad_values_are_one_line_and_write_nothing(
    model: str,
    task: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["train", "--model", model, "--task", task, "--out", str(out), *options]
    line = fails(capsys, *command)
    assert line.startswith("piece-ops train: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl"]


def test_a_bad_row_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"question": "a"}\n')
    line = fails(capsys, "eval", "--model", model, "--task", f"bad={path}")
    assert f"{path}, line 2: wanted the keys 'prompt' and 'answer', got 'question'" in line


def test_debug_keeps_the_traceback(model: str, tmp_path: Path) -> None:
    command = ["eval", "--model", model, "--task", f"bad={tmp_path}/none.jsonl", "--debug"]
    with pytest.raises(ValueError, match="there is no file or folder"):
        cli.main(command)


def test_an_interruption_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("piece_ops._native.describe", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "piece-ops info: interrupted\n"
