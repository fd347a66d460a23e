"""The report: one page that needs nothing else, from whatever a run has left."""

from __future__ import annotations

import base64
import json
import random
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from piece_ops import cli
from piece_ops.training import load_task, run
from piece_ops.training.figures import DPI, WIDTH
from piece_ops.training.output import OutputError
from piece_ops.training.page import REPORT, write_report
from piece_ops.training.reading import read_run, read_selection
from piece_ops.training.results import Results, ResultsError
from piece_ops.training.variants import variants
from piece_ops.training.where import places, shared

from helpers.made_runs import made_results, made_selection, write_run
from helpers.tiny_lm import COLOURS, quick, save_tiny, write_rows

FIGURES = ["scores", "stream", "training", "general", "where", "overlap", "cost"]


@dataclass
class Page:
    """A page taken apart."""

    images: list[dict[str, str]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    titles: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    text: str = ""


class Reader(HTMLParser):
    """Reads a page; every element must be closed in order."""

    VOID = frozenset({"meta", "link", "img", "wbr"})

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page, self.open, self.rows = page, [""], [[""]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.page.tags.add(tag)
        self.page.addresses += [given[name] for name in ("src", "href", "srcset") if name in given]
        if tag == "img":
            self.page.images.append(given)
        elif tag == "table":
            name = given["aria-label"]
            while name in self.page.tables:
                name += " again"
            self.rows = self.page.tables[name] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag in ("h1", "h2", "h3", "summary"):
            self.page.titles.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        elif self.open[-1] in ("h1", "h2", "h3", "summary"):
            self.page.titles[-1] += data
        if self.open[-1] != "style":
            self.page.text += data


def read_page(path: Path) -> Page:
    """Read a page, and check what holds of every one."""
    page, text = Page(), path.read_text(encoding="utf-8")
    reader = Reader(page)
    reader.feed(text)
    assert reader.open == [""]
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?:|//cdn|@import|url\(", text)
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "base"}
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    for image in page.images:
        assert len(image["alt"]) > 40
        width, height = png_size(base64.b64decode(image["src"].partition(",")[2]))
        assert width == round(WIDTH * DPI) and 200 < height <= 10 * DPI
    for rows in page.tables.values():
        assert {len(row) for row in rows} == {len(rows[0])}
    return page


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.rstrip().endswith(b"IEND\xaeB`\x82")
    assert len(content) > 2000
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def report(tmp_path: Path, results: Results, selections: bool = True) -> Page:
    """The page of one made-up run."""
    folder = write_run(tmp_path / "run", results, selections)
    write_report([folder], tmp_path / "page.html")
    return read_page(tmp_path / "page.html")


def test_a_page_says_what_the_results_say(tmp_path: Path) -> None:
    results = made_results(["one", "two", "three"])
    page = report(tmp_path, results)
    assert page.titles[0] == "Run run" and len(page.images) == len(FIGURES)
    assert "one fell most since it was learned: -" in page.images[0]["alt"]
    found = page.tables["R: score in % (row: after, column: on)"]
    assert found[0] == ["after", "1 one", "2 two", "3 three"]
    assert [row[0] for row in found[1:]] == ["base", "1 one", "2 two", "3 three"]
    texts = [["-" if v is None else f"{100 * v:.1f}" for v in row] for row in results.accuracy]
    assert [row[1:] for row in found[1:]] == texts
    summary = results.summary()
    for key in ("accuracy_backward_transfer", "accuracy_forgetting", "accuracy_forward_transfer"):
        assert f"{100 * (summary[key] or 0):+.1f}" in page.text
    for word in ("OP, %", "BWT", "FWT", "forgetting", "d", "english", "code"):
        assert word in page.text
    assert "below zero is forgetting" in page.text  # a definition
    settings = dict(row for row in page.tables["Settings"])
    assert settings["method"] == "piece-g" and settings["lr"] == "0.005"
    assert "torch" in dict(page.tables["Environment"])
    seconds = page.tables["Seconds"]
    assert seconds[0] == ["of", "load", "evaluate", "general", "select", "train"]
    assert seconds[-1] == ["all", "1.5", "51.8", "8.0", "37.5", "120.0"]
    assert page.tables["Most resident memory in GB"][1] == [
        "base",
        "0.50",
        "0.60",
        "0.60",
        "-",
        "-",
    ]


def test_figures_lie_beside_the_page_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_results(["one", "two"]))
    written = write_report([folder], tmp_path / "page.html")
    beside = [tmp_path / "page-figures" / f"{name}.png" for name in FIGURES]
    assert written == [tmp_path / "page.html", *beside]
    page = read_page(written[0])
    for path, image in zip(written[1:], page.images, strict=True):
        assert path.read_bytes() == base64.b64decode(image["src"].partition(",")[2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page-figures", "page.html", "run"]


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = [made_results(["one", "two"], method=method) for method in ("snip", "full")]
    folders = [write_run(tmp_path / str(i), result) for i, result in enumerate(results)]
    first = write_report(folders, tmp_path / "a.html")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "savefig.dpi": 30}):
        second = write_report(folders, tmp_path / "b.html")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    page = read_page(first[0])
    assert page.titles[0] == "2 runs compared" and "snip, lr 0.005" in page.titles
    names = [path.stem for path in first[1:]]
    own = [f"{i}-{name}" for i in (1, 2) for name in FIGURES]
    assert names == ["gain-forgetting", "gain-drift", *own]
    assert len(page.images) == len(names)


def test_where_and_overlap_count_the_selections(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_results(["one", "two"]))
    chosen = [selection for _, selection in read_run(folder).selections]
    sets = [
        {(name, i) for name, where in selection.indices.items() for i in where.tolist()}
        for selection in chosen
    ]
    assert shared(*chosen) == len(sets[0] & sets[1]) > 0
    write_report([folder], tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    (name,) = (name for name in page.tables if name.startswith("Shared coordinates"))
    both, either = len(sets[0] & sets[1]), len(sets[0] | sets[1])
    assert page.tables[name][1] == [
        "1 one",
        f"{len(sets[0])}",
        f"{both} ({100 * both / either:.2f} %)",
    ]
    found = places(chosen)
    assert found.layers == [*(f"model.layers.{i}" for i in range(6)), "(no layer)"]
    assert found.kinds[0] == "self_attn.v_proj.weight"
    column = found.kinds.index("mlp.down_proj.weight")
    wanted = sum(
        name == "model.layers.3.mlp.down_proj.weight" for every in sets for name, _ in every
    )
    assert found.chosen[3][column] == wanted / 2
    assert found.chosen[-1][column] is None  # no such module outside the layers
    total = sum(value for row in found.chosen for value in row if value is not None)
    assert total == pytest.approx(sum(map(len, sets)) / 2)


def test_refreshed_selections_count_together(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_results(["one"]))
    first = read_selection(folder, 0, "one")
    second = made_selection(random.Random(5))
    second.save(folder / "selections" / "1-one.refresh-1.safetensors")
    both = read_selection(folder, 0, "one")
    assert first and both
    for name, positions in both.indices.items():
        parts = [s.indices[name].tolist() for s in (first, second) if name in s.indices]
        assert set(positions.tolist()) == {i for part in parts for i in part}
    assert read_selection(folder, 1, "two") is None
    assert sorted(p.name for p in folder.iterdir()) == ["results.json", "selections"]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    page = report(tmp_path, made_results(["one", "two"], reached=0))
    assert "The run is not complete: 0 of 2 tasks so far." in page.text
    assert "In numbers" in page.titles and "Training" not in page.titles
    results = Results("m", quick(), 10, [], [])
    assert report(tmp_path / "none", results).titles[-1] == "Settings and environment"
    out = str(tmp_path / "empty.html")
    assert cli.main(["report", str(tmp_path / "none" / "run"), "--out", out]) == 0


def test_an_unfinished_run_is_found_by_its_name(tmp_path: Path) -> None:
    write_run(tmp_path / "run.unfinished", made_results(["one", "two", "three"], reached=1))
    write_report([tmp_path / "run"], tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    assert "1 of 3 tasks so far" in page.text
    assert [row[0] for row in page.tables["R: score in % (row: after, column: on)"]] == [
        *("after", "base", "1 one"),
    ]
    assert "Overlap of the selections" not in page.titles  # one selection overlaps with nothing


def test_one_task_no_memory_no_texts_no_selection(tmp_path: Path) -> None:
    results = made_results(["only"], method="full")
    results.texts, results.general, results.base_memory = [], [[], []], {}
    results.tasks[0].memory = {}
    folder = write_run(tmp_path / "run", results, selections=False)
    value = json.loads((folder / "results.json").read_text())
    for key in ("base_memory", "peak_rss_bytes", "benchmarks", "transfer", "versions", "machine"):
        del value[key]  # as an earlier release wrote it
    del value["tasks"][0]["memory"], value["tasks"][0]["metric"], value["settings"]["lora_rank"]
    (folder / "results.json").write_text(json.dumps(value))
    write_report([folder], tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    assert "how much memory was taken is not known" in page.text
    assert len(page.images) == 4
    assert "Where the selected coordinates lie" not in page.titles


def test_a_run_that_diverged(tmp_path: Path) -> None:
    results = made_results(["one", "two", "three"])
    results.accuracy[2] = [None, float("nan"), None]
    results.loss[3] = [float("inf"), None, 2.0]
    results.tasks[1].losses = [float("nan")] * 4
    results.tasks[2].losses = [0.0, 1e-9, 5.0, 1e9]
    results.general[3] = [None, float("inf")]
    results.benchmarks = [{"lambada acc": 0.5}, {"lambada acc": 0.25}, {}, {"lambada acc": 0.4}]
    page = report(tmp_path, results)
    assert page.tables["R: score in % (row: after, column: on)"][3] == ["2 two", "-", "-", "-"]
    assert page.tables["Perplexity, and d, the rise of its logarithm"][4][1:] == ["-"] * 4
    assert page.tables["Scores"][3] == ["2 two", "-"]


def test_twenty_tasks_with_long_names(tmp_path: Path) -> None:
    names = [f"the_{i}th_task_of_a_long_stream_with_a_name_to_match" for i in range(20)]
    page = report(tmp_path, made_results(names))
    found = page.tables["R: score in % (row: after, column: on)"]
    assert len(found) == 22 and found[0][20] == f"20 {names[19]}"
    assert len(page.tables["After every task (OP in %, the others in points)"]) == 21


@pytest.mark.filterwarnings("error")
def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    names = ["<script>alert(1)<", "a & b $x$ $", "日本語", '"quoted"']
    results = made_results(names)
    results.model = "</p><script src=x>"
    page = report(tmp_path, results)
    assert dict(page.tables["Settings"])["model"] == "</p><script src=x>"
    assert [row[0] for row in page.tables["The tasks, in the order of learning"][1:]] == [
        f"{i} {name}" for i, name in enumerate(names, start=1)
    ]


def made_runs(tmp_path: Path, kinds: Sequence[tuple[str, float, int]]) -> list[Path]:
    return [
        write_run(tmp_path / f"run-{i}", made_results(["a", "b"], method=m, lr=lr, seed=seed))
        for i, (m, lr, seed) in enumerate(kinds)
    ]


@pytest.fixture
def comparison_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what a page says of each single run, which takes a second a run."""
    monkeypatch.setattr("piece_ops.training.page.run_sections", lambda run: [])


@pytest.mark.usefixtures("comparison_only")
def test_several_runs_are_compared(tmp_path: Path) -> None:
    kinds = [("piece-g", 1e-3, 0), ("piece-g", 3e-3, 0), ("lora", 1e-4, 0), ("lora", 1e-4, 1)]
    folders = made_runs(tmp_path, kinds)
    folders.append(write_run(tmp_path / "half", made_results(["a", "b"], 1, method="full")))
    written = write_report(folders, tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    caption = "After the last task (OP in %, changes in points, d in nats, means over the seeds)"
    table, each = page.tables[caption], page.tables["The same of every run"]
    assert [row[:2] for row in table[1:]] == [
        ["piece-g, lr 0.001", "1"],
        ["piece-g, lr 0.003", "1"],
        ["lora, lr 0.0001", "2"],
        ["full, lr 0.005, 1 of 2 tasks", "1"],
    ]
    assert [row[0] for row in each[1:]] == [
        "piece-g, lr 0.001, seed 0",
        "piece-g, lr 0.003, seed 0",
        "lora, lr 0.0001, seed 0",
        "lora, lr 0.0001, seed 1",
        "full, lr 0.005, seed 0, 1 of 2 tasks",
    ]
    found = []
    for row, (method, lr, seed) in zip(each[1:5], kinds, strict=True):
        named = dict(zip(each[0], row, strict=True))
        results = made_results(["a", "b"], method=method, lr=lr, seed=seed)
        summary = {key: value or 0.0 for key, value in results.summary().items()}
        assert named["OP"] == f"{100 * summary['accuracy_final']:.1f}"
        gain = summary["accuracy_learned"] - summary["accuracy_base"]
        assert named["gain"] == f"{100 * gain:+.1f}"
        assert named["log perplexity"] == f"{sum(results.general[-1]) / 2:.3f}"
        found.append((summary["accuracy_forgetting"], gain))
    points = [*found[:2], tuple(sum(pair) / 2 for pair in zip(*found[2:], strict=True))]
    for row, (price, gain) in zip(table[1:4], points, strict=True):
        named = dict(zip(table[0], row, strict=True))
        assert named["gain"] == f"{100 * gain:+.1f}"
        others = [(p, g) for p, g in points if (p, g) != (price, gain)]
        is_beaten = any(p <= price and g >= gain for p, g in others)
        assert named["front: forgetting"] == ("" if is_beaten else "yes")
    assert table[4][-2:] == ["", ""]
    assert "Runs that have not learned all their tasks are not in the figures." in page.text
    assert "mind what you compare" not in page.text
    assert [path.name for path in written[1:]] == ["gain-forgetting.png", "gain-drift.png"]
    assert "3 kinds of 4 runs of piece-g, lora" in page.images[0]["alt"]


def test_variants_have_names_of_their_own_and_a_summary_is_small(tmp_path: Path) -> None:
    """Every setting that differs is in the legend, seeds are not, and runs are left out."""
    folders = []
    for rate in (1e-3, 3e-3):
        for seed in (0, 1):
            for more in ({}, {"keep_statistics": True}, {"reference": "kept=r.txt"}):
                made = made_results(["a", "b"], lr=rate, seed=seed, **more)
                folders.append(write_run(tmp_path / f"r{len(folders)}", made))
    runs = [read_run(folder) for folder in folders]
    assert [(of.series, len(of.runs)) for of in variants(runs)[:3]] == [
        ("piece-g", 2),
        ("piece-g, keep statistics", 2),
        ("piece-g, reference kept=r.txt", 2),
    ]
    written = write_report(folders, tmp_path / "page.html", summary=True)
    page = read_page(tmp_path / "page.html")
    assert len(page.images) == len(written) - 1 == 2
    assert "Every run" not in page.titles and "The same of every run" in page.tables
    assert written[0].stat().st_size < 300_000
    arguments = ["report", str(folders[0]), "--summary", "--out", str(tmp_path / "one.html")]
    assert cli.main(arguments) == 2


@pytest.mark.usefixtures("comparison_only")
def test_runs_that_do_not_compare(tmp_path: Path) -> None:
    first = write_run(tmp_path / "x", made_results(["a", "b"]))
    other = made_results(["a", "c"])
    other.model, other.texts = "another", other.texts[:1]
    other.tasks[1].held_out_rows = 7
    other.general = [row[:1] for row in other.general]
    second = write_run(tmp_path / "y", other)
    write_report([first, second, first], tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    assert "different base models, tasks, held-out rows, general texts: mind what" in page.text
    table = page.tables["After the last task (OP in %, changes in points, d in nats)"]
    assert [row[0] for row in table[1:]] == [
        f"piece-g, lr 0.005 ({name}, {i})" for i, name in enumerate("xyx", start=1)
    ]


@pytest.mark.usefixtures("comparison_only")
def test_two_unfinished_runs_have_no_points(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, made_results(["a", "b"], reached))
        for reached, name in enumerate("xy")
    ]
    write_report(folders, tmp_path / "page.html")
    assert not read_page(tmp_path / "page.html").images


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"

    def refused(words: str, changes: dict[str, object] | None = None) -> None:
        path = (
            write_run(tmp_path / words.replace("/", "-")[:30], made_results(["a"])) / "results.json"
        )
        value = json.loads(path.read_text())
        for key, change in (changes or {}).items():
            value.pop(key) if change is None else value.update({key: change})
        path.write_text(json.dumps(value))
        with pytest.raises(ResultsError, match=words):
            write_report([path.parent], out)

    with pytest.raises(ResultsError, match=r"wanted the folder of a run, got no results\.json"):
        write_report([tmp_path], out)
    refused("got another file", {"format": "something"})
    refused("must have format version 1, got 9; it was written by another release", {"version": 9})
    refused("it has no entry 'general_loss'; it was written by another", {"general_loss": None})
    refused("unexpected keyword argument 'new'", {"settings": {"new": 1}})
    refused("method must be one of", {"settings": {"method": "new"}})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"format": "piece_ops.run"')
    assert cli.main(["report", str(tmp_path / "broken"), "--out", str(out)]) == 2
    assert "results.json: cannot be read: Expecting" in capsys.readouterr().err
    run = write_run(tmp_path / "run", made_results(["a"]))
    whole = (run / "selections" / "1-a.safetensors").read_bytes()
    (run / "selections" / "1-a.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        write_report([run], out)
    with pytest.raises(ValueError, match="wanted at least one run, got none"):
        write_report([], out)
    for name in ("page.txt", "run", "none/page.html"):
        with pytest.raises(OutputError, match=r"ends in \.html|there is no folder"):
            write_report([run], tmp_path / name)
    assert not out.exists() and not (tmp_path / "page-figures").exists()


def test_a_run_writes_its_report_after_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tasks = str(save_tiny(tmp_path / "model")), []
    for name in ("one", "two"):
        path = write_rows(tmp_path / f"{name}.jsonl", COLOURS)
        tasks.append((load_task(name, path), path))
    seen: list[int] = []

    def say(line: str) -> None:
        page = tmp_path / "out.unfinished" / REPORT
        seen.append(read_page(page).text.count("of 2 tasks so far") if page.exists() else -1)

    run(folder, tasks, quick(), tmp_path / "out", save=False, say=say)
    assert seen == [-1, 1]  # when the second task has been measured, that of the first is there
    page = read_page(tmp_path / "out" / REPORT)
    assert len(page.images) == len(FIGURES) - 1  # without general texts
    assert "not complete" not in page.text
    assert len(list((tmp_path / "out" / "report-figures").glob("*.png"))) == len(page.images)
    out = tmp_path / "again.html"
    assert cli.main(["report", str(tmp_path / "out"), "--out", str(out)]) == 0
    assert "with 6 figures beside it" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "out" / REPORT).read_bytes()

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no picture")

    said: list[str] = []
    monkeypatch.setattr("piece_ops.training.page.run_sections", fails)
    results = run(folder, tasks[:1], quick(), tmp_path / "other", save=False, say=said.append)
    assert results.complete and (tmp_path / "other" / "results.json").exists()
    assert said[-1] == "note: the report could not be written: ZeroDivisionError: no picture"
