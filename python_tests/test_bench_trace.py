"""The comparison on TRACE: its commands and its page, without a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import trace
from demo.compare import Job
from piece_ops.cli import build_parser
from piece_ops.training.options import settings_of


def made(name: str, seed: int, lr: float, learned: float, after: float, drift: float) -> Any:
    """A run whose first task is `learned` and ends at `after`; the others stay at `learned`."""
    accuracy = [[0.1] * 3, [learned, 0.1, None], [learned, learned, 0.1], [after, learned, learned]]
    return {
        "method": name,
        "seed": seed,
        "lr": lr,
        "trained": 7,
        "accuracy": accuracy,
        "loss": [[None if x is None else 1 - x for x in row] for row in accuracy],
        "log_perplexity_drift": {"english": drift, "code": drift},
        "summary": {
            "accuracy_final": (after + 2 * learned) / 3,
            "accuracy_backward_transfer": (after - learned) / 2,
            "loss_final": 1.0,
        },
    }


def test_every_command_is_valid() -> None:
    for variant in trace.STUDY.variants:
        for held_out, tasks in (("eval", 1), ("test", 3)):
            job = Job(variant, 1e-3, held_out, 1)
            parsed = build_parser().parse_args(
                trace.STUDY.run_command(Path("m"), Path("d"), Path("o"), job)
            )
            settings = settings_of(parsed)
            assert len(parsed.task) == len(parsed.metric) == tasks
            assert (settings.seed, settings.train_rows, parsed.held_out) == (1, 200, held_out)
        assert variant.rates or variant.name in trace.STUDY.same_rate


def test_the_page_averages_seeds_and_finds_the_fronts() -> None:
    chosen = [
        made("piece-g", 0, 3e-3, 0.5, 0.5, 0.01),
        made("piece-g", 1, 3e-3, 0.7, 0.5, 0.03),
        made("full", 0, 1e-5, 0.5, 0.5, 0.05),
        made("full", 1, 1e-5, 0.5, 0.5, 0.05),
    ]
    lines = trace.summary_table(chosen).splitlines()[2:]
    found = [re.split(r"  +", line.strip()) for line in lines]
    # piece-g: gain (0.4 + 0.6) / 2, BWT (0 - 0.1) / 2, loss gain the same as gain, d 0.02.
    assert found[0] == (
        ["piece-g", "0.003", "2", "56.7", "-5.0", "50.0", "0.500", "+0.0200", *["front"] * 3]
    )
    assert found[1] == (
        ["full", "1e-05", "2", "50.0", "0.0", "40.0", "0.400", "+0.0500", "front", "-", "-"]
    )


def test_the_page_is_the_recorded_one() -> None:
    study = json.loads(trace.RESULTS.read_text(encoding="utf-8"))
    assert trace.page(study) == trace.PAGE.read_text(encoding="utf-8")
    assert {run["method"] for run in study["chosen"]} <= {v.name for v in trace.STUDY.variants}
