"""The benchmark command on made-up cases: what is absent, slow, wrong or interrupted."""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench import harness, machine, report
from bench.harness import Absent, Case, Peer, Row


def case(*peers: Peer, seconds: float = 4.0) -> Case:
    return Case("made", "fp32", 10, 40, list(peers), peer_seconds=seconds)


def ours(result: Any = None, check: Any = None) -> Peer:
    return Peer("ours", lambda: result, check, "ours")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[], Case]]]:
    """An op whose cases the test writes; all others are gone."""
    cases: dict[str, Callable[[], Case]] = {}
    module: Any = types.ModuleType("bench.made_up")
    module.cases = lambda quick: iter(cases.items())
    monkeypatch.setitem(sys.modules, "bench.made_up", module)
    monkeypatch.setattr(bench, "OPS", {"made": "made_up"})
    described = machine.describe()  # asks git, which takes a moment
    monkeypatch.setattr(machine, "describe", lambda: described)
    yield cases


def run(*arguments: str) -> int:
    return bench.run(bench.parse(["--quick", "--threads", "1", *arguments]))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_a_case_that_cannot_be_built_is_a_row(made: Any, tmp_path: Path) -> None:
    def no_model() -> Case:
        raise Absent("no model here")

    made.update(first=no_model, second=lambda: case(ours()))
    assert run("--out", str(tmp_path / "rows")) == 0
    rows = [line for line in lines_of(tmp_path / "rows") if line["kind"] == "row"]
    assert [row["status"] for row in rows] == ["absent: no model here", "ok"]
    page = report.page(report.load([tmp_path / "rows"]))
    assert "absent: no model here" in page


def test_a_wrong_answer_of_ours_fails(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made.update(first=lambda: case(ours(3, lambda got: f"{got} instead of 4")))
    assert run() == 1
    assert "wrong: 3 instead of 4" in capsys.readouterr().out


def test_an_interrupted_run_leaves_the_results_alone(made: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("of last time\n")

    def interrupted() -> Case:
        raise KeyboardInterrupt

    made.update(first=lambda: case(ours()), second=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--out", str(path))
    assert path.read_text() == "of last time\n"
    assert {line["case"] for line in lines_of(tmp_path / "rows.part")} == {"first"}


def test_other_cases_are_kept_on_request(made: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    made.update(first=lambda: case(ours()), second=lambda: case(ours(), ours()))
    assert run("--out", str(path)) == 0
    before = lines_of(path)
    assert run("--out", str(path), "--only", "second", "--update") == 0
    after = lines_of(path)
    assert after[:2] == before[:2] and len(after) == len(before)
    assert not (tmp_path / "rows.part").exists()
    assert run("--out", str(path), "--only", "second") == 0
    assert {line["case"] for line in lines_of(path)} == {"second"}


def test_seconds_of_each_case_are_recorded(made: Any, tmp_path: Path) -> None:
    made.update(first=lambda: time.sleep(0.05) or case(ours()))  # type: ignore[func-returns-value]
    assert run("--out", str(tmp_path / "rows")) == 0
    (line,) = [line for line in lines_of(tmp_path / "rows") if line["kind"] == "case"]
    assert line["seconds"] >= 0.05


def test_without_a_floor_there_is_no_percent(made: Any, tmp_path: Path) -> None:
    bound = Peer("a part of it", lambda: None, role="bound")
    made.update(first=lambda: case(ours(), bound))
    assert run("--out", str(tmp_path / "rows")) == 0
    lines = lines_of(tmp_path / "rows")
    assert all(line["percent_of_bandwidth"] is None for line in lines if line["kind"] == "row")
    table = report.case_table(lines)
    assert len([row for row in table.splitlines() if "|  |" in row]) == 2, table
    assert "*a part of it*" in table


def test_a_slow_peer_is_called_once() -> None:
    calls: Counter[str] = Counter()

    def peer(name: str, seconds: float) -> Peer:
        return Peer(name, lambda: (calls.update([name]), time.sleep(seconds)))

    slow, fast = harness.run_case(case(peer("slow", 0.2), peer("fast", 0), seconds=0.1), False)
    assert (calls["slow"], len(slow.times_ms)) == (1, 1) and slow.p50_ms >= 200
    assert len(fast.times_ms) == harness.MOST_ROUNDS == calls["fast"] - 2


def test_memory_that_is_not_there() -> None:
    harness.require_memory(0)
    with pytest.raises(Absent, match=r"needs 1000000000\.0 GB of memory"):
        harness.require_memory(1e18)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("op", bench.OPS)
def test_names_of_cases_are_unique(op: str, quick: bool) -> None:
    module = importlib.import_module(f"bench.{bench.OPS[op]}")
    names = [name for name, _ in module.cases(quick)]
    assert names and len(set(names)) == len(names)


def test_targets_say_when_nothing_was_measured() -> None:
    target = harness.Target("faster", harness.time_ratio("a", "b"), 2, at_most=False)
    made = Case("made", "fp32", 1, 1, [], [target])
    lines = list(bench.records("x", made, [Row("a", "peer", "absent: no a", 1)]))
    assert [line["verdict"] for line in lines if line["kind"] == "target"] == ["not measured"]
