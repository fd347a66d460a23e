"""The benchmark of the whole pipeline on a small model: every way runs, is right, has a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import __main__ as bench
from bench import report
from bench.bench_pipeline import FEWEST, OURS
from bench.pipeline_official import OFFICIAL
from bench.pipeline_peft import LORA, SHIRA
from bench.pipeline_torch import FISH, FULL, MASKINGS, split_positions
from bench.pipeline_way import (
    WARM_UP,
    Measured,
    Positions,
    Way,
    agreement,
    wrong_losses,
    wrong_moves,
)

TRAINED = [OURS, *MASKINGS, FISH, SHIRA, LORA, FULL]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    path: Path = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    assert (
        bench.run(bench.parse(["pipeline", "--quick", "--threads", "1", "--out", str(path)])) == 0
    )
    return path


def test_every_way_is_right(out: Path) -> None:
    lines = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    rows = {line["peer"]: line for line in lines if line["kind"] == "row"}
    assert set(rows) == {*TRAINED, OFFICIAL}
    for name in (*TRAINED, OFFICIAL):
        row, figures = rows[name], rows[name]["figures"]
        assert row["status"] == "ok", row
        assert row["repeats"] == figures["steps"] - WARM_UP == FEWEST - WARM_UP  # all alike
        assert min(figures[k] for k in ("state_bytes", "file_bytes", "ddp_bytes")) > 0
        assert figures["last_epoch_loss"] < figures["first_epoch_loss"]
        phases = [key for key in figures if key.endswith("_extra_bytes")]
        assert len(phases) == (1 if name in (SHIRA, LORA, FULL) else 3)
    assert {"importance_ms", "select_ms", "set_up_ms"} <= set(rows[OFFICIAL]["figures"])
    assert all(rows[name]["figures"]["same_positions"] == 1 for name in MASKINGS)
    targets = [line for line in lines if line["kind"] == "target"]
    assert len(targets) == 9
    assert all(line["verdict"] in ("met", "short") for line in targets)


def test_bytes_are_those_of_k(out: Path) -> None:
    """DistributedDataParallel would reduce 4 bytes a selected weight, full tensors with masks."""
    lines = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    figures = {line["peer"]: line["figures"] for line in lines if "figures" in line}
    n = next(line["n"] for line in lines)
    assert figures[OURS]["ddp_bytes"] == 4 * (n // 1000)
    assert figures[FULL]["ddp_bytes"] == 4 * n
    assert figures[FULL]["state_bytes"] == 12 * n
    assert figures[FISH]["state_bytes"] == 16 * n
    assert figures[MASKINGS[0]]["state_bytes"] == 4 * figures[MASKINGS[0]]["ddp_bytes"]


def test_report(out: Path, tmp_path: Path) -> None:
    table = report.case_table(next(iter(report.load([out]).values())))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(TRAINED) + 1
    assert len({row.count("|") for row in rows}) == 1
    assert f"| **{OURS}** |" in rows[2]


def test_split_positions() -> None:
    found = split_positions(torch.tensor([7, 0, 6]), {"a": 2, "b": 3, "c": 4})
    assert {name: part.tolist() for name, part in found.items()} == {"a": [0], "c": [1, 2]}


def test_what_cannot_run_is_a_row() -> None:
    class Missing(Way):
        name = "missing"

        def set_up(self, chosen: Positions, folder: Path) -> None:
            raise ImportError("no such module")

    missing = Measured(Missing, nn.Linear(2, 2), [])
    missing.start(None)
    missing.step()
    missing.finish(1.0)
    assert (missing.row.status, missing.row.times_ms) == ("absent: no such module", [])


def test_checks_see_what_is_wrong() -> None:
    base, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(base.state_dict())
    way, chosen = Way(other), {"weight": torch.tensor([1])}
    assert wrong_moves(way, base, chosen) is None
    with torch.no_grad():
        other.weight.view(-1)[1] += 1
        assert wrong_moves(way, base, chosen) is None
        other.weight.view(-1)[2] += 1
    assert wrong_moves(way, base, chosen) == "weights of weight moved that were not selected"
    assert wrong_losses([2.0, 2.0, 1.0, 1.0], 2.0, 2) is None
    assert wrong_moves(way, base, None) == "weights of weight moved that were not selected"
    assert "do not fall" in str(wrong_losses([2.0, 1.0, 2.0, 1.0], 2.0, 2))
    assert "not finite" in str(wrong_losses([2.0, float("nan")], 2.0, 1))
    assert "first loss" in str(wrong_losses([3.0, 2.0], 2.0, 1))
    assert agreement(chosen, {"weight": torch.tensor([1, 2])}) == 0.5
