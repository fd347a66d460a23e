"""The benchmark command on made-up cases: what is absent, slow, wrong or interrupted."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench import bench_scaling, bench_select_topk, harness, machine, plots, predicted, report
from bench.harness import Absent, Case, Peer, Row
from bench.inputs import gaussian_squared


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
    def cost_model() -> Case:
        raise Absent("no model here")

    made.update(first=cost_model, second=lambda: case(ours()))
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


def test_a_slow_peer_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    now = 0.0
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=lambda: now))

    def peer(name: str, seconds: float) -> Peer:
        def work() -> None:
            nonlocal now
            now += seconds
            calls[name] += 1

        return Peer(name, work)

    peers = [peer("slow", 5.0), peer("long", 1.5), peer("middling", 0.9), peer("fast", 0.01)]
    rows = harness.run_case(case(*peers, seconds=4.0), quick=False)
    # One call to check and measure memory, one to warm up, then what fits into four seconds.
    most = harness.MOST_ROUNDS
    assert calls == {"slow": 1, "long": 1 + 2, "middling": 2 + 4, "fast": 2 + most}
    assert [len(row.times_ms) for row in rows] == [1, 2, 4, most]
    assert rows[0].p50_ms == pytest.approx(5000)


def test_memory_that_is_not_there() -> None:
    harness.require_memory(0)
    with pytest.raises(Absent, match=r"needs 1000000000\.0 GB of memory"):
        harness.require_memory(1e18)


def test_all_cases_are_planned_to_end_in_a_quarter_of_an_hour(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert set(bench.PLANNED) == set(bench.OPS)
    assert sum(bench.PLANNED.values()) <= 800
    bench.list_cases(bench.parse(["total", "gather", "--dry"]))
    out = capsys.readouterr().out
    assert "total: 1 cases" in out and "  135 M, 272 tensors" in out
    assert f"{bench.PLANNED['total'] + bench.PLANNED['gather']} s planned" in out
    cases = {("total", "a"): [{"kind": "case", "seconds": 2.4}], ("total, CUDA", "b"): []}
    table = report.time_table(cases).splitlines()
    assert f"| total | 1 | 2 | {bench.PLANNED['total']} |" in table
    assert table[-1] == f"| all | | 2 | {sum(bench.PLANNED.values())} |"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("op", bench.OPS)
def test_names_of_cases_are_unique(op: str, quick: bool) -> None:
    module = importlib.import_module(f"bench.{bench.OPS[op]}")
    names = [name for name, _ in module.cases(quick)]
    assert names and len(set(names)) == len(names)


def cost_model(line: dict[str, Any], gb_per_s: float | None) -> float | None:
    """As `bench.__main__.run_one` predicts, on a CPU of 100 GFLOP/s."""
    return predicted.milliseconds(line, gb_per_s, 100.0)


def test_targets_say_when_nothing_was_measured() -> None:
    target = harness.Target("faster", harness.time_ratio("a", "b"), 2, at_most=False)
    made = Case("made", "fp32", 1, 1, [], [target])
    lines = list(bench.records("x", made, [Row("a", "peer", "absent: no a", 1)], cost_model))
    assert [line["verdict"] for line in lines if line["kind"] == "target"] == ["not measured"]


def test_every_way_to_select_is_right() -> None:
    made = bench_select_topk.main_row(gaussian_squared, 2000)
    rows = {row.peer: row for row in harness.run_case(made, quick=True)}
    absent = {"std::nth_element + scan"} if not shutil.which("g++") else set()
    assert {name for name, row in rows.items() if row.status != "ok"} == absent
    assert len(rows) == 9


def test_no_compiler_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    bench_select_topk.nth_element_library.cache_clear()
    peer = bench_select_topk.Peers(gaussian_squared(10), 2).nth_element()
    (row,) = harness.run_case(case(peer), quick=True)
    assert row.status == "absent: no C++ compiler"


@pytest.mark.parametrize("peer", ["topk", "argpartition"])
def test_too_little_memory_is_a_row(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(n_bytes: float) -> None:
        raise Absent(f"needs {n_bytes} bytes")

    monkeypatch.setattr(bench_select_topk, "require_memory", none_left)
    made = getattr(bench_select_topk.Peers(gaussian_squared(10), 2), peer)()
    (row,) = harness.run_case(case(made), quick=True)
    assert row.status.startswith("absent: needs")


def test_rows_of_a_sweep_are_compared_at_their_own_place() -> None:
    """Bandwidth and best peer of the same x; the cost model at the row's own sizes."""

    def row(name: str, x: int, ms: float, role: harness.Role) -> Row:
        at = {"x": x, "n": x, "series": name, "kernel": "total"}
        return Row(f"{name}, {x}", role, "ok", 4 * x, [ms], at=at)

    ways: list[tuple[str, float, harness.Role]]
    ways = [("floor", 2.0, "floor"), ("other", 8.0, "peer"), ("piece_ops", 4.0, "ours")]
    rows = [row(name, x, ms * x, role) for x in (10**6, 10**7) for name, ms, role in ways]
    lines = [
        line for line in bench.records("sweep", case(), rows, cost_model) if line["role"] == "ours"
    ]
    assert [line["n"] for line in lines] == [10**6, 10**7]
    for line in lines:
        assert (line["best_peer_over_this"], line["percent_of_bandwidth"]) == (2, 50)
        assert line["predicted_ms"] == pytest.approx(2.0 * line["n"], abs=1)


SWEEPS = [name for name, _ in bench_scaling.cases(True)]


@pytest.mark.parametrize(
    "name", [n for n in SWEEPS if n.endswith("against elements") or "select" in n]
)
def test_every_sweep_runs(name: str) -> None:
    made = dict(bench_scaling.cases(True))[name]()
    rows = harness.run_case(made, quick=True)
    assert {row.status for row in rows} == {"ok"}, rows
    lines = list(bench.records(name, made, rows, cost_model))
    assert all(line["predicted_ms"] > 0 for line in lines if line["role"] == "ours")


def test_large_places_have_the_promises_of_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scaling, "DRAWN", 20_000)
    for op, text in (("select_topk", "time / one read"), ("accumulate_squares_", "bandwidth / a")):
        places = [bench_scaling.Place(n) for n in (10_000, 20_000)]
        made = bench_scaling.sweep(op, places)
        rows = {row.peer: row for row in harness.run_case(made, quick=True)}
        (target,) = made.targets
        assert target.text.startswith(text) and target.text.endswith(", 20,000")
        got = target.measure(rows)
        assert got is not None and got > 0
        assert target.measure({}) is None


def test_sweeps_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they have had their time, large places are rows that say so; small ones still run."""
    monkeypatch.setattr(bench_scaling, "BUDGET", 0.0)
    monkeypatch.setattr(bench_scaling, "DRAWN", 10_000)
    places = [bench_scaling.Place(n) for n in (10_000, 20_000)]
    rows = harness.run_case(bench_scaling.sweep("total", places), quick=True)
    assert [row.status for row in rows] == ["ok", "ok", "absent: the sweeps before had taken 0 s"]


# ---- the report -------------------------------------------------------------------------------

ROOT = Path(report.__file__).parents[1]


def test_the_committed_pages_are_those_of_the_committed_rows() -> None:
    """Else: python -m bench.report bench/results/cpu.jsonl bench/results/cuda.jsonl"""
    results = ROOT / "bench" / "results"
    cases = report.load([results / "cpu.jsonl", results / "cuda.jsonl"])
    for path, text in report.pages(cases, ROOT).items():
        assert path.read_text(encoding="utf-8") == text, path
    figures = {file for _key, file, _what, _draw in plots.plots(cases)}
    assert {path.name for path in (ROOT / "docs" / "plots").glob("*.svg")} == figures


def test_plots_of_a_sweep_and_of_a_pipeline(tmp_path: Path) -> None:
    """Every figure is drawn, named in the page, and the same twice; what is old goes."""
    pytest.importorskip("matplotlib")
    head = {"kind": "row", "status": "ok", "note": "", "dtype": "fp32", "extra_bytes": None}
    head.update(p20_ms=1.0, p80_ms=3.0, repeats=3, gb_per_s=1.0, percent_of_bandwidth=None)
    head.update(best_peer_over_this=None, bytes=1, **machine.describe(), quick=True)
    sweep = [
        {**head, "op": "scaling", "case": f"total against {kind}", "peer": f"{series}, {x}"}
        | {"series": series, "x": x, "role": role, "p50_ms": x, "predicted_ms": x}
        for kind in plots.AXES
        for series, role in (("piece_ops", "ours"), ("other", "peer"), ("one read", "floor"))
        for x in (1, 10)
    ]
    figures = {"importance_ms": 5.0, "select_ms": 1.0, "set_up_ms": 1.0, "steps": 20}
    figures.update(checkpoint_ms=1.0, state_bytes=1, file_bytes=2, ddp_bytes=3)
    ways = [
        {**head, "op": "pipeline", "case": "all", "peer": name, "role": role, "p50_ms": 2.0}
        | {"figures": figures}
        for name, role in (("piece_ops", "ours"), ("masks", "peer"))
    ]
    path = tmp_path / "rows"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*sweep, *ways]))
    cases = report.load([path])
    (tmp_path / "old.svg").write_text("")
    first = {file.name: file.read_bytes() for file in plots.draw(cases, tmp_path)}
    assert len(first) == len(plots.AXES) + 1 and not (tmp_path / "old.svg").exists()
    assert first == {file.name: file.read_bytes() for file in plots.draw(cases, tmp_path)}
    page = report.page(cases)
    assert all(f"](plots/{name})" in page for name in first)
    assert b"cost model" in first["scaling-total-against-elements.svg"]
    assert plots.phase_seconds(ways[0])["steps"] == pytest.approx(0.04)
    readme = report.section(cases)
    assert "| **piece_ops** | 1 ms | 2 ms | 1 B | 2 B | 3 B |" in readme


def test_the_readme_says_what_is_not_recorded() -> None:
    names = [(op, name) for op in bench.OPS for name, _ in bench.module_of(op).cases(False)]
    every: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in names}
    assert report.not_recorded(every) == ""
    for op, name in names[:2] + names[-1:]:
        del every[op, name]
    assert "yet: 2 of select_topk, 1 of scaling." in report.not_recorded(every)


def test_the_readme_shows_main_targets_and_counts_every_miss() -> None:
    def target(op: str, case: str, verdict: str) -> dict[str, Any]:
        text = {"op": op, "case": case, "kind": "target", "target": f"{case} {verdict}"}
        return {**text, "limit": 1, "at_most": True, "unit": "x", "measured": 2, "verdict": verdict}

    lines = [
        target("sparse_adamw_", "main", "met"),
        target("other", "aside", "met"),
        target("other", "aside", "short"),
    ]
    second = [target("sparse_adamw_", "second", "met")]
    cases = {("sparse_adamw_", "main"): lines[:1], ("other", "aside"): lines[1:]}
    cases["sparse_adamw_", "second"] = second
    table = report.targets_table(cases, all_of_them=False)
    assert "main met" in table
    assert not any(text in table for text in ("aside", "second"))
    assert "Of all 4 targets 1 are missed (other 1 of 2)" in report.missed(cases)
    assert "aside met" in report.targets_table(cases)
