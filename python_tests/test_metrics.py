"""Scores of answers, and what a matrix of scores says about a stream of tasks."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from piece_ops import cli
from piece_ops.training import Encoder, Row, evaluate, load_task, run
from piece_ops.training.benchmarks import check_lm_eval, lm_eval_scores
from piece_ops.training.measure import greedy_answers
from piece_ops.training.metrics import METRICS, edit, letter, number, rouge_l
from piece_ops.training.report import format_results
from piece_ops.training.settings import Settings
from piece_ops.training.transfer import curves, forgetting

from helpers.tiny_lm import COLOURS, quick, save_tiny, tiny_model, tiny_tokenizer, write_rows

WORDS = "the a cat dog sat ran on under mat 12 Tree, tree. über".split()


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("B", "B\nA letter starts with a greeting.", 1),
        ("The answer is (C).", "C", 1),
        ("Answer: A", "A", 1),  # not the A of Answer
        ("a", "A", 0),
        ("E", "E", 1),
        ("none of them", "A", 0),
        ("A or B", "B", 0),
    ],
)
def test_the_first_letter_that_stands_alone_counts(answer: str, wanted: str, right: int) -> None:
    assert letter(answer, wanted) == right


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("11", "11", 1),
        ("11 apples, not 12", "11", 1),
        ("11.0", "11", 1),
        ("1,000", "1000", 1),
        ("1,2", "1", 1),  # no thousands
        ("-3", "3", 0),
        (".5", "0.5", 1),
        ("3.37.", "3.37", 1),
        ("eleven", "11", 0),
        (" June ", "June", 1),
        ("July", "June", 0),
    ],
)
def test_the_first_number_counts_by_value(answer: str, wanted: str, right: int) -> None:
    assert number(answer, wanted) == right


def longest_common(a: list[str], b: list[str]) -> int:
    """The textbook's table."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return int(table[-1, -1])


def test_rouge_l_is_that_of_rouge_score() -> None:
    package = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = package.RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(3)
    words = ["the", "The", "cat", "sat-down", "2", "x_y", "été", "end.", "", "\n"]
    for _ in range(300):
        one, two = (" ".join(draw.choices(words, k=draw.randrange(9))) for _ in range(2))
        wanted = scorer.score(two, one)["rougeL"].fmeasure
        assert rouge_l(one, two) == pytest.approx(wanted, abs=1e-12), (one, two)


def test_edit_similarity_and_rouge_l_follow_their_definitions() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        one, two = (" ".join(draw.choice(WORDS, draw.integers(1, 9))) for _ in range(2))
        common = longest_common(list(one), list(two))
        # Insertions and deletions: everything outside the common part.
        assert edit(one, two) == pytest.approx(2 * common / (len(one) + len(two)))
        words = [
            "".join(c if c in "abcdefghijklmnopqrstuvwxyz0123456789" else " " for c in t.lower())
            for t in (one, two)
        ]
        lists = [text.split() for text in words]
        common = longest_common(*lists)
        precision, recall = common / len(lists[0]), common / len(lists[1])
        f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        assert rouge_l(one, two) == pytest.approx(f1)
    assert edit(" same", "same ") == rouge_l("same", "same") == 1
    assert rouge_l("", "") == edit("", "word") == 0


def test_bleu_is_of_the_corpus() -> None:
    bleu = METRICS["bleu"].score
    long = "the quick brown fox jumps over the lazy dog"
    assert bleu([long, long], [long, long]) == pytest.approx(1.0)
    half = bleu([long, "a completely different line of words"], [long, long])
    assert 0 <= bleu(["cat"], [long]) < half < 1


def test_a_metric_decides_score_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, model = Encoder(tiny_tokenizer(), "plain", 64), tiny_model()
    rows = [Row("a", "red and more words"), Row("b", "blue")]
    lengths: list[int | None] = []

    def answers(*arguments: Any) -> list[str]:
        lengths.append(arguments[-1])
        return ["red and", "blue"]

    monkeypatch.setattr("piece_ops.training.measure.greedy_answers", answers)
    assert evaluate(model, encoder, rows).accuracy == 0.5
    score = evaluate(model, encoder, rows, metric="rouge-l", most_tokens=9)
    assert score.accuracy == pytest.approx((2 / 3 + 1) / 2)
    evaluate(model, encoder, rows, metric="letter")
    assert lengths == [None, 9, 16]
    with pytest.raises(ValueError, match=r"a metric must be one of exact, .*, got 'best'"):
        evaluate(model, encoder, rows, metric="best")


def test_answers_are_cut_at_most_tokens() -> None:
    encoder, model = Encoder(tiny_tokenizer(), "plain", 64), tiny_model()
    rows = encoder.encode_all([Row("a", "red and more words")])
    whole, cut = (greedy_answers(model, encoder, rows, 1, False, most) for most in (None, 3))
    assert whole[0].startswith(cut[0]) and len(cut[0]) <= 3 < len(whole[0])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    path = write_rows(tmp_path / "a.jsonl", COLOURS)
    with pytest.raises(ModuleNotFoundError, match=r"the metric edit needs .* rapidfuzz"):
        load_task("a", path, metric="edit")
    with pytest.raises(ModuleNotFoundError, match=r"needs .* lm_eval.*: pip install lm_eval"):
        check_lm_eval()
    model = str(save_tiny(tmp_path / "model"))
    with pytest.raises(ModuleNotFoundError, match="lm_eval"):
        run(model, [(load_task("a", path), path)], quick(lm_eval=("x",)), tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()


# ----------------------------------------------------------------------------------------- transfer


def test_transfer_follows_its_formulas() -> None:
    draw = np.random.default_rng(1)
    tasks = 4
    scores = draw.random((tasks + 1, tasks))
    matrix: list[list[float | None]] = [[float(x) for x in row] for row in scores]
    for t, found in enumerate(curves(matrix), start=1):
        wanted = {"op": scores[t, :t].mean(), "bwt": None, "fwt": None, "forgetting": None}
        if t > 1:
            past = range(t - 1)
            best, least = ([f(scores[i + 1 : t, i]) for i in past] for f in (np.max, np.min))
            wanted["bwt"] = np.mean([scores[t, i] - scores[i + 1, i] for i in past])
            wanted["fwt"] = np.mean([scores[i, i] - scores[0, i] for i in range(1, t)])
            wanted["forgetting"] = np.mean(best - scores[t, : t - 1])
            lost = np.mean(scores[t, : t - 1] - least)
            assert forgetting(matrix, t, -1) == pytest.approx(lost)
        assert found == {k: None if v is None else pytest.approx(v) for k, v in wanted.items()}


def test_what_was_not_measured_is_not_guessed() -> None:
    matrix: list[list[float | None]] = [[0.1, 0.2], [0.5, None], [0.4, 0.9]]
    first, last = curves(matrix)
    assert first == {"op": 0.5, "bwt": None, "fwt": None, "forgetting": None}
    assert last["fwt"] is None and last["bwt"] == pytest.approx(-0.1)
    assert curves(matrix[:1]) == []


# -------------------------------------------------------------------------------------- in the run


def fake_lm_eval(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package that measures nothing but answers like lm_eval."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.append({**arguments, "training": arguments["model"]["pretrained"].training})
        found = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact,flexible": 1}
        return {"results": {task: found for task in arguments["tasks"]}}

    package: Any = types.ModuleType("lm_eval")
    package.simple_evaluate = simple_evaluate
    models: Any = types.ModuleType("lm_eval.models.huggingface")
    models.HFLM = lambda **arguments: arguments
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    return calls


def test_lm_eval_tasks_are_measured_after_every_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = fake_lm_eval(monkeypatch)
    model = tiny_model().train()
    wanted = {"arc acc": 0.25, "arc exact,flexible": 1.0}
    assert lm_eval_scores(model, tiny_tokenizer(), ["arc"], 3, 2) == wanted
    assert model.training and not calls[0]["training"]
    assert (calls[0]["tasks"], calls[0]["limit"]) == (["arc"], 3)

    path = write_rows(tmp_path / "a.jsonl", COLOURS)
    folder = str(save_tiny(tmp_path / "model"))
    settings = quick(lm_eval=("arc",), lm_eval_limit=2)
    results = run(
        folder, [(load_task("a", path), path)], settings, tmp_path / "out", save=False, report=False
    )
    assert results.benchmarks == [wanted, wanted]
    lines = format_results(results).splitlines()
    assert ["arc", "acc", "0.250", "0.250"] in [line.split() for line in lines]
    assert Settings.from_dict(settings.as_dict()) == settings
    with pytest.raises(ValueError, match="lm_eval_limit belongs to lm_eval"):
        quick(lm_eval_limit=2)


def test_metrics_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = save_tiny(tmp_path / "model"), write_rows(tmp_path / "one.jsonl", COLOURS)
    command = ["eval", "--model", str(model), "--task", f"one={path}"]
    assert cli.main([*command, "--metric", "one=edit", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:2] == ["task", "metric"]
    assert printed[2].split()[:3] == ["one", "edit", "4"]
    for metric, message in (
        ("one=best", "task one: a metric must be one of exact, letter"),
        ("two=edit", "--metric: wanted the name of a task, got 'two'"),
        ("edit", "--metric: wanted NAME=METRIC, got 'edit'"),
    ):
        assert cli.main([*command, "--metric", metric]) == 2
        assert message in capsys.readouterr().err
