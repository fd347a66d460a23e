"""Measuring a model: answers, answer loss, perplexity."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from piece_ops.training import Encoder, Row, evaluate
from piece_ops.training.measure import Text, answer_loss, greedy_answers, perplexity
from piece_ops.training.train import train_task

from helpers.tiny_lm import quick, tiny_model, tiny_tokenizer


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer(), "plain", 64)


def test_answer_loss_is_the_mean_over_tokens(encoder: Encoder) -> None:
    model = tiny_model()
    rows = encoder.encode_all([Row("a", "b"), Row("abcde", "fghij"), Row("abc", "de")])
    losses = []
    for row in rows:  # each by itself, without padding
        ids = torch.tensor([[*row.prompt, *row.answer]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(row.answer), reduction="none"))
    wanted = torch.cat(losses).mean().item()
    for size in (1, 2, 3):
        assert answer_loss(model, encoder, rows, size) == pytest.approx(wanted, rel=1e-5)


def test_greedy_answers_equal_a_plain_argmax_loop(encoder: Encoder) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.3  # must not matter
    rows = encoder.encode_all([Row("hello", "xy"), Row("a", "b"), Row("what", "z")])
    most = max(len(row.answer) for row in rows) + 4
    wanted = []
    for row in rows:
        ids = list(row.prompt)
        for _ in range(most):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == encoder.end_id:
                break
        text = encoder.tokenizer.decode(ids[len(row.prompt) :], skip_special_tokens=True)
        wanted.append(text.strip())
    assert greedy_answers(model, encoder, rows, 3) == wanted
    assert greedy_answers(model, encoder, rows, 1) == wanted


def test_a_learned_task_is_answered_exactly(encoder: Encoder) -> None:
    model = tiny_model()
    rows = [Row("a", "red"), Row("b", "blue")]
    assert evaluate(model, encoder, rows).accuracy == 0
    settings = quick(method="full", lr=1e-2, steps=60, batch_size=2)
    trained = train_task(model, encoder, encoder.encode_all(rows), "t", settings, None)
    score = evaluate(model, encoder, [*rows, Row("a", " red "), Row("a", "green")])
    assert score.accuracy == 0.75
    assert score.rows == 4
    assert trained.losses[-1] < 0.5 < trained.losses[0]
    assert not model.training
    with pytest.raises(ValueError, match="wanted at least one row, got none"):
        evaluate(model, encoder, [])


def test_perplexity_is_weighted_by_tokens(encoder: Encoder) -> None:
    model = tiny_model()
    windows = tuple(tuple(w) for w in encoder.text_windows("the quick brown fox", 8))
    sums, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        sums += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    found = perplexity(model, encoder, Text("t", windows), 2)
    assert found == pytest.approx(math.exp(sums / count), rel=1e-5)
