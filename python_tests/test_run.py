"""The continual run: what it measures, writes, refuses and prints."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

import piece_ops.training.work as work_module
from piece_ops._files import write_json, write_tensors, write_text
from piece_ops.delta import Delta
from piece_ops.selection import Selection
from piece_ops.training import Row, Task, load_model, load_task, run
from piece_ops.training.extra import require
from piece_ops.training.memory import peak_memory, peak_rss_bytes
from piece_ops.training.models import ModelError, load_tokenizer
from piece_ops.training.output import OutputError, RunFolder, is_run
from piece_ops.training.report import format_results, format_table
from piece_ops.training.results import Results, TaskRecord
from piece_ops.training.settings import TRAIN_METHODS
from piece_ops.training.tasks import TaskError

from helpers.tiny_lm import COLOURS, quick, save_tiny, tiny_model, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_tiny(tmp_path_factory.mktemp("model"))


def tasks_in(folder: Path) -> list[tuple[Task, Path]]:
    """Two small tasks."""
    pairs = []
    for name, rows in (("one", COLOURS), ("two", [(p, p.upper()) for p, _ in COLOURS])):
        path = write_rows(folder / f"{name}.jsonl", rows)
        pairs.append((load_task(name, path), path))
    return pairs


def texts_in(folder: Path) -> list[tuple[str, Path]]:
    (folder / "english.txt").write_text("the quick brown fox jumps over the lazy dog")
    return [("english", folder / "english.txt")]


@pytest.mark.parametrize("method", TRAIN_METHODS)
def test_a_run_measures_trains_and_saves(folder: Path, tmp_path: Path, method: str) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    settings = quick(method=method, keep_statistics=method not in ("full", "lora"))
    results = run(
        str(folder),
        tasks_in(tmp_path),
        settings,
        out,
        texts=texts_in(tmp_path),
        say=said.append,
        report=False,
    )
    value = json.loads((out / "results.json").read_text())
    assert value["complete"] and value == {**results.as_dict(), "written": value["written"]}
    again = Results.from_dict(value)
    assert (again.settings, again.tasks, again.texts) == (settings, results.tasks, results.texts)
    assert again.peak_rss_bytes == results.peak_rss_bytes
    assert again.summary() == results.summary()
    assert [[x is None for x in row] for row in value["accuracy"]] == [
        [False, False],
        [False, False],
        [False, False],
    ]
    assert len(value["general_loss"]) == 3 and value["texts"][0]["tokens"] == 43
    assert len(said) == 2 and "task 1 of 2, one" in said[0]
    assert not (tmp_path / "out.unfinished").exists()
    total = sum(p.numel() for p in tiny_model().parameters())
    k = {"full": total, "lora": 7424}.get(method, int(0.01 * total))
    assert [task["trained"] for task in value["tasks"]] == [k, k]
    assert len(value["tasks"][0]["losses"]) == 3

    model = load_model(str(out / "model"))
    load_tokenizer(str(out / "model"))
    base = dict(tiny_model().named_parameters())
    changed = {n: (p != base[n]).flatten().nonzero()[:, 0] for n, p in model.named_parameters()}
    if method in ("full", "lora"):
        assert not (out / "selections").exists() and not (out / "deltas").exists()
        assert (out / "checkpoints").exists() == (method == "lora")
        return
    chosen: dict[str, set[int]] = {}
    for i, name in enumerate(("one", "two"), start=1):
        selection = Selection.load(out / "selections" / f"{i}-{name}.safetensors")
        assert selection.k == k and selection.method == method
        for tensor, indices in selection.indices.items():
            chosen.setdefault(tensor, set()).update(indices.tolist())
    for name, positions in changed.items():
        assert set(positions.tolist()) <= chosen.get(name, set())
    again = tiny_model()
    for i, name in enumerate(("one", "two"), start=1):
        delta = Delta.load(out / "deltas" / f"{i}-{name}.safetensors")
        delta.apply_(again)
        assert (delta.task, delta.method) == (name, method)
    for parameter, wanted in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, wanted)
    for name in ("one", "two"):
        assert (out / "statistics" / f"{name}.safetensors").exists() == settings.keep_statistics
    text = format_results(results)
    assert f"{method}, {k:,} of {total:,} parameters a task" in text
    assert "after one" in text and "one" in text


def test_the_same_seed_gives_the_same_run(folder: Path, tmp_path: Path) -> None:
    found = []
    settings = quick(method="piece-g")
    for name in ("a", "b"):
        results = run(str(folder), tasks_in(tmp_path), settings, tmp_path / name, report=False)
        found.append((results.loss, [task.losses for task in results.tasks]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["rows.jsonl", "words.txt"])
def test_a_reference_may_be_rows_or_text(folder: Path, tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "rows.jsonl", COLOURS)
    (tmp_path / "words.txt").write_text("some words that must be kept as they are")
    settings = quick(method="piece-g", reference=f"keep={tmp_path / name}")
    tasks, out = tasks_in(tmp_path)[:1], tmp_path / "out"
    results = run(str(folder), tasks, settings, out, save=False, report=False)
    assert results.complete
    assert not (tmp_path / "out" / "model").exists()
    for reference in ("words", f"keep={tmp_path}/none.txt"):
        settings = quick(method="piece-g", reference=reference)
        with pytest.raises(TaskError):
            run(str(folder), tasks_in(tmp_path), settings, tmp_path / "new")
    assert not (tmp_path / "new.unfinished").exists()


def test_bad_runs_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    with pytest.raises(TaskError, match="wanted at least one task, got none"):
        run(str(folder), [], quick(), out)
    with pytest.raises(TaskError, match="a name of its own, got 'one' twice"):
        run(str(folder), [tasks[0], tasks[0]], quick(), out)
    with pytest.raises(ModelError, match="wanted a folder or a hub id, got no such folder"):
        run(str(tmp_path / "no"), tasks, quick(), out)
    with pytest.raises(TaskError, match=r"none\.txt: there is no such file"):
        run(str(folder), tasks, quick(), out, texts=[("t", tmp_path / "none.txt")])
    with pytest.raises(ValueError, match="must take at most 7 tokens"):
        long = Task("t", (Row("a", "b" * 20),), (Row("a", "b"),), "test")
        run(str(folder), [(long, tmp_path)], quick(max_tokens=8), out)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_is_replaced_only_by_a_complete_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, out = tasks_in(tmp_path), tmp_path / "out"
    run(str(folder), tasks[:1], quick(), out, save=False, report=False)
    first = (out / "results.json").read_text()
    with pytest.raises(OutputError, match="already holds a run; choose another folder, or --over"):
        run(str(folder), tasks, quick(), out)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "train_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(str(folder), tasks, quick(), out, overwrite=True)
    assert (out / "results.json").read_text() == first
    left = json.loads((tmp_path / "out.unfinished" / "results.json").read_text())
    assert not left["complete"] and len(left["accuracy"]) == 1

    with pytest.raises(OutputError, match="already holds a run"):
        run(str(folder), tasks, quick(), out)
    run(str(folder), tasks, quick(), out, overwrite=True, save=False, report=False)
    assert len(json.loads((out / "results.json").read_text())["tasks"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.jsonl", "out", "two.jsonl"]


def test_output_folders_that_are_no_runs_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds other files"):
        RunFolder(tmp_path / "mine", overwrite=True)
    with pytest.raises(OutputError, match="got a file of that name"):
        RunFolder(tmp_path / "mine" / "thesis.txt", overwrite=True)
    (tmp_path / "new.unfinished").mkdir()
    with pytest.raises(OutputError, match="an unfinished run is in"):
        RunFolder(tmp_path / "new", overwrite=False)
    with RunFolder(tmp_path / "new", overwrite=True):
        (tmp_path / "new.unfinished" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is in the way and is not an unfinished run"):
        RunFolder(tmp_path / "new", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        with RunFolder(tmp_path / "mine" / "thesis.txt" / "run", overwrite=False):
            pass
    with pytest.raises(OutputError, match="a folder of its own"):
        RunFolder(Path("/"), overwrite=True)
    (tmp_path / "empty").mkdir()
    with RunFolder(tmp_path / "empty", overwrite=False) as target:
        (target.work / "results.json").write_text('{"format": "piece_ops.run"}')
        target.finish()
    assert is_run(tmp_path / "empty") and not is_run(tmp_path / "mine")


def test_models_that_cannot_be_loaded(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold config\.json, got none"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="got the folder of a run, whose model is"):
        save_tiny(tmp_path / "model")
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16, got 'int8'"):
        load_model(str(folder), dtype="int8")
    broken = save_tiny(tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(ModelError, match=r"broken: cannot be loaded: SafetensorError"):
        load_model(str(broken))
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(broken))
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_a_missing_weight_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .*model\.norm\.weight"):
        load_model(str(tmp_path))


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r"a run needs .*: pip install piece_ops\[train\]"
    ):
        require("piece_ops_no_such_package", "a run")
    assert require("json", "a run") is json


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("as it was")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"a\.safetensors cannot be written: .*[Tt]oo large"):
            write_tensors(path, {"a": torch.zeros(5000)}, file_format="f", version=1, info={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets a peak")
def test_memory_is_told_by_phase() -> None:
    peaks: dict[str, int] = {}
    size = 200 * 2**20
    with peak_memory(peaks, "large"):
        torch.ones(size, dtype=torch.uint8)
    with peak_memory(peaks, "small"):
        pass
    assert peaks["large"] - peaks["small"] > 0.9 * size
    assert peak_rss_bytes() >= peaks["large"]
    first = peaks["large"]
    with peak_memory(peaks, "large"):
        pass
    assert peaks["large"] == first


def test_the_summary_and_the_table_follow_the_matrices() -> None:
    records = [TaskRecord(name, name, "test", 8, 10, 0, trained=5) for name in "ab"]
    results = Results("m", quick(), 1000, records, [])
    results.accuracy = [[0.0, 0.1], [0.8, None], [0.5, 0.9]]
    results.loss = [[9.0, 8.0], [1.0, None], [2.0, math.nan]]
    summary = results.summary()
    assert summary["accuracy_base"] == pytest.approx(0.05)
    assert summary["accuracy_learned"] == pytest.approx(0.85)
    assert summary["accuracy_final"] == pytest.approx(0.7)
    assert summary["accuracy_backward_transfer"] == pytest.approx(-0.3)
    assert summary["loss_backward_transfer"] == pytest.approx(1.0)
    assert summary["log_perplexity_drift"] is None
    assert results.as_dict()["loss"][2] == [2.0, None]
    lines = format_results(results).splitlines()
    assert next(line for line in lines if line.startswith("a ")).split()[1:6] == [
        *("10", "0.0", "80.0", "50.0", "-30.0"),
    ]
    assert format_table(["a", "b"], [["x", "10"]]) == "a   b\n-----\nx  10"
