"""The lm_eval task list of a run, with the real package, on tasks of local rows: no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")
from piece_ops.training import load_task, run
from piece_ops.training.benchmarks import lm_eval_scores

from helpers.tiny_lm import COLOURS, quick, save_tiny, tiny_model, tiny_tokenizer, write_rows

ROWS = [
    {"question": f"{letter}?", "choices": ["red", "blue"], "answer": i % 2}
    for i, letter in enumerate("abcdefgh")
]
CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["?"], max_gen_toks: 3, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A multiple-choice task and one of written answers, as paths of YAML files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, text in (("colours", CHOICE), ("written", WRITTEN)):
        (tmp_path / f"{name}.yaml").write_text(text.format(rows=rows), encoding="utf-8")
    return str(tmp_path / "colours.yaml"), str(tmp_path / "written.yaml")


@torch.no_grad()
def accuracy(model: Any, limit: int) -> float:
    """The share of rows whose right choice (after a blank) is likelier, counted by hand."""
    tokenizer, right = tiny_tokenizer(), 0
    for row in ROWS[:limit]:
        likelihoods = []
        for choice in row["choices"]:
            prompt = tokenizer(row["question"], add_special_tokens=False).input_ids
            whole = [*prompt, *tokenizer(f" {choice}", add_special_tokens=False).input_ids]
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(
                sum(float(logs[t - 1, whole[t]]) for t in range(len(prompt), len(whole)))
            )
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    return right / limit


@pytest.mark.parametrize("limit", [None, 5])
def test_scores_are_those_counted_by_hand(tasks: tuple[str, str], limit: int | None) -> None:
    model = tiny_model().train()
    before = torch.get_rng_state()
    scores = lm_eval_scores(model, tiny_tokenizer(), tasks, limit, batch_size=3)
    assert set(scores) == {"colours acc", "written exact_match"}
    assert model.training
    assert scores["colours acc"] == accuracy(model.eval(), limit or len(ROWS))
    assert 0.0 <= scores["written exact_match"] <= 1.0
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(Exception, match="no_such_task"):
        lm_eval_scores(tiny_model(), tiny_tokenizer(), ["no_such_task"], None, 1)


def test_a_run_measures_them_after_every_task_and_learns_the_same(
    tasks: tuple[str, str], tmp_path: Path
) -> None:
    """lm_eval seeds every generator: with dropout, training would notice."""
    model = str(save_tiny(tmp_path / "model", dropout=0.1))
    path = write_rows(tmp_path / "a.jsonl", COLOURS)
    stream = [(load_task(name, path), path) for name in ("one", "two")]
    found = {}
    for name, settings in (("with", quick(lm_eval=tasks, lm_eval_limit=4)), ("without", quick())):
        found[name] = run(model, stream, settings, tmp_path / name, report=name == "with")
    benchmarks = found["with"].benchmarks
    assert len(benchmarks) == 3 and benchmarks[0]["colours acc"] == accuracy(
        tiny_model(dropout=0.1).eval(), 4
    )
    assert all(row.keys() == {"colours acc", "written exact_match"} for row in benchmarks)
    assert "General ability by lm_eval" in (tmp_path / "with" / "report.html").read_text()
    for delta in sorted((tmp_path / "without" / "deltas").iterdir()):
        wanted, got = (load_file(tmp_path / n / "deltas" / delta.name) for n in found)
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            assert torch.equal(tensor, got[name]), name
