"""Measuring a model: written answers and answer loss on a task, perplexity on general text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from piece_ops.training.encoding import IGNORED, EncodedRow, Encoder, chunks
from piece_ops.training.extra import require
from piece_ops.training.metrics import METRICS, check_metric
from piece_ops.training.tasks import Row

GENERATION_SLACK = 4
"""Tokens a model may write beyond the longest right answer: other spellings of the same text."""


@dataclass(frozen=True)
class Score:
    """What a model reaches on the held-out rows of a task.

    Attributes
    ----------
    accuracy : float
        What the task's metric makes of the greedy answers, 0 to 1: by default the share of rows
        whose answer equals the wanted one.
    loss : float
        Mean negative log likelihood of the answer and end tokens, in nats per token, over all
        tokens of all rows.
    rows : int
        How many rows.
    """

    accuracy: float
    loss: float
    rows: int


@dataclass(frozen=True)
class Text:
    """A text for perplexity: a name and its windows of token ids."""

    name: str
    windows: tuple[tuple[int, ...], ...]


def progress(items: Any, label: str, enabled: bool, total: int | None = None) -> Any:
    """Wrap an iterable in a tqdm bar that disappears when it is done."""
    bars = require("tqdm", "the progress bar")
    return bars.tqdm(
        items,
        desc=label,
        total=total,
        disable=None if enabled else True,
        leave=False,
        dynamic_ncols=True,
    )


def _by_length(rows: Sequence[EncodedRow]) -> list[int]:
    """Order rows by length, so that a batch has little padding."""
    return sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every counted token, float32, for logits [B, T, V] and labels [B, T]."""
    wanted = labels[:, 1:]
    # Only the counted positions are turned to float32 and normalised: prompts are the larger part
    # of a batch.
    counted = wanted != IGNORED
    return F.cross_entropy(logits[:, :-1][counted].float(), wanted[counted], reduction="none")


@torch.no_grad()
def answer_loss(
    model: Any,
    encoder: Encoder,
    rows: Sequence[EncodedRow],
    batch_size: int = 16,
    show: bool = False,
) -> float:
    """Return the mean loss of the answer and end tokens, in nats per token.

    Parameters
    ----------
    model : causal language model
        Called as ``model(input_ids=..., attention_mask=...)``, must return ``logits`` of shape [B,
        T, vocabulary].
    encoder : Encoder
    rows : sequence of EncodedRow
    batch_size : int
    show : bool
        Show a progress bar.

    Returns
    -------
    float
        Sum of the losses divided by the number of tokens (a long answer counts more than a short
        one).
    """
    ordered = [rows[i] for i in _by_length(rows)]
    return _mean_loss(model, encoder, ordered, batch_size, "answer loss", show)


@torch.no_grad()
def greedy_answers(
    model: Any,
    encoder: Encoder,
    rows: Sequence[EncodedRow],
    batch_size: int = 32,
    show: bool = False,
    most_tokens: int | None = None,
) -> list[str]:
    """Let the model write its most likely answer to every prompt.

    A row may take as many tokens as the longest wanted answer of `rows` plus 4, and no more than
    `most_tokens`; without an end token by then the answer is what stands there.

    Parameters
    ----------
    model : causal language model with ``generate``
    encoder : Encoder
    rows : sequence of EncodedRow
    batch_size : int
    show : bool
        Show a progress bar.
    most_tokens : int, optional

    Returns
    -------
    list of str
        In the order of `rows`, special tokens removed, white space at both ends removed.
    """
    order = _by_length(rows)
    most = max(len(row.answer) for row in rows) + GENERATION_SLACK
    most = most if most_tokens is None else min(most, most_tokens)
    stops = sorted({encoder.end_id, int(encoder.tokenizer.eos_token_id)})
    answers = [""] * len(rows)
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for group in progress(groups, "answers", show):
        batch = encoder.generation_batch([rows[i] for i in group], device=_device(model))
        written = model.generate(
            **batch,
            do_sample=False,
            num_beams=1,
            max_new_tokens=most,
            eos_token_id=stops,
            pad_token_id=encoder.pad_id,
            # A model's own generation settings may hold sampling values, which greedy decoding
            # would warn about.
            temperature=None,
            top_p=None,
            top_k=None,
        )
        for i, ids in zip(group, written[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            ends = [place for place, token in enumerate(ids) if token in stops]
            text = encoder.tokenizer.decode(
                ids[: ends[0]] if ends else ids, skip_special_tokens=True
            )
            answers[i] = text.strip()
    return answers


def evaluate(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    batch_size: int = 16,
    show: bool = False,
    *,
    metric: str = "exact",
    most_tokens: int | None = None,
) -> Score:
    """Measure a model on rows of a task.

    Parameters
    ----------
    model : causal language model with ``generate``
        Its mode (train or eval) is put back afterwards.
    encoder : Encoder
    rows : sequence of Row
        Not empty.
    batch_size : int
        Rows in one forward pass; generation takes twice as many.
    show : bool
        Show progress bars.
    metric : str
        One of `METRICS`.
    most_tokens : int, optional
        Longest answer; by default what the metric needs.

    Returns
    -------
    Score

    Raises
    ------
    ValueError
        If there are no rows, or the metric is unknown.

    Examples
    --------
    >>> evaluate(model, Encoder(tokenizer), task.held_out).accuracy  # doctest: +SKIP
    0.87
    """
    if not rows:
        raise ValueError("piece_ops.evaluate: wanted at least one row, got none")
    check_metric(metric, "piece_ops.evaluate")
    most_tokens = METRICS[metric].most_tokens if most_tokens is None else most_tokens
    encoded = encoder.encode_all(rows)
    was_training = model.training
    model.eval()
    try:
        answers = greedy_answers(model, encoder, encoded, 2 * batch_size, show, most_tokens)
        loss = answer_loss(model, encoder, encoded, batch_size, show)
    finally:
        model.train(was_training)
    score = METRICS[metric].score(answers, [row.answer for row in rows])
    return Score(score, loss, len(rows))


@torch.no_grad()
def text_loss(
    model: Any, encoder: Encoder, text: Text, batch_size: int = 16, show: bool = False
) -> float:
    """Return the mean loss in nats per token, over all tokens but the first of each window.

    Parameters
    ----------
    model : causal language model
        Its mode is put back afterwards.
    encoder : Encoder
    text : Text
        Windows of token ids (``Encoder.text_windows``); each is read by itself.
    batch_size : int
        Windows in one forward pass.
    show : bool
        Show a progress bar.

    Returns
    -------
    float
        Sum of the losses divided by the number of tokens.
    """
    # A window is a "prompt" of one token and an "answer" of the rest: the same collation and the
    # same loss.
    rows = [EncodedRow(window[:1], window[1:]) for window in text.windows]
    was_training = model.training
    model.eval()
    try:
        return _mean_loss(model, encoder, rows, batch_size, f"perplexity {text.name}", show)
    finally:
        model.train(was_training)


def perplexity(
    model: Any, encoder: Encoder, text: Text, batch_size: int = 16, show: bool = False
) -> float:
    """Return the perplexity of a text: exp of its `text_loss`, infinite beyond what exp can hold.

    Examples
    --------
    >>> windows = encoder.text_windows(words, 256)  # doctest: +SKIP
    >>> text = Text("english", tuple(tuple(w) for w in windows))  # doctest: +SKIP
    >>> perplexity(model, encoder, text)  # doctest: +SKIP
    21.4
    """
    loss = text_loss(model, encoder, text, batch_size, show)
    return math.exp(loss) if loss < 700 else math.inf


def _mean_loss(
    model: Any,
    encoder: Encoder,
    rows: Sequence[EncodedRow],
    batch_size: int,
    label: str,
    show: bool,
) -> float:
    """Return the mean loss of all labelled tokens of `rows`, summed in float64."""
    loss_sum, count = 0.0, 0
    for group in progress(list(chunks(rows, batch_size)), label, show):
        batch = encoder.training_batch(group, device=_device(model))
        labels = batch.pop("labels")
        losses = _token_losses(model(**batch).logits, labels)
        loss_sum += float(losses.double().sum())
        count += losses.numel()
    return loss_sum / count


def _device(model: Any) -> Any:
    """Return the device of a model's first parameter."""
    return next(model.parameters()).device
