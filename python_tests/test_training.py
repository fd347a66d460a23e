"""The settings of a run and the training of one task."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from piece_ops.training import Encoder, Row
from piece_ops.training.choose import Chooser, sample_rows, shuffled_batches
from piece_ops.training.encoding import EncodedRow
from piece_ops.training.train import TrainingError, rate_factor, train_task

from helpers.tiny_lm import COLOURS, quick, tiny_model, tiny_tokenizer


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer(), "plain", 64)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"method": "best"}, "method must be one of .*, got 'best'"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density must be above 0"),
        ({"lr": -1.0}, "lr must be a finite number above 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": None, "epochs": 0.0}, "epochs must be"),
        ({"epochs": 1.0}, "wanted steps or epochs, got both"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": 0}, "accumulation must be"),
        ({"warmup": 1.1}, "warmup must be between 0 and 1"),
        ({"clip": -1.0}, "clip must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"importance_rows": 0}, "importance_rows must be"),
        ({"window": 1}, "window must be at least 2"),
        ({"prompt_format": "x"}, "prompt_format must be one of"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, got 'float64'"),
        ({"method": "full", "dtype": "bfloat16"}, "full needs dtype float32, got bfloat16"),
        (
            {"method": "lora", "keep_statistics": True},
            "belong to methods that select, got method lora",
        ),
        ({"method": "piece-f", "reference": "a=b"}, "reference belongs to piece-g"),
        ({"method": "piece-f", "xi": 0.1}, "xi belongs to piece-s"),
        ({"method": "piece-s", "xi": 0.0}, "xi must be"),
        ({"memory_budget": 0}, "memory_budget must be at least 1, got 0"),
        ({"accumulators": "float16"}, "accumulators must be one of float32, bfloat16"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**bad)


def test_epochs_become_whole_steps() -> None:
    assert quick(steps=7).step_count(1000) == 7
    assert quick(steps=None).step_count(10) == 8  # 3 passes over 10 rows by 4
    assert quick(steps=None, epochs=0.1, accumulation=2).step_count(10) == 1


def test_every_pass_takes_every_row_once() -> None:
    rows = [EncodedRow((i,), (1,)) for i in range(5)]
    batches = itertools.islice(shuffled_batches(rows, 2, 0, "t"), 5)
    order = [row.prompt[0] for batch in batches for row in batch]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))
    assert order[:5] != order[5:]
    assert sample_rows(rows, 3, 0, "t") == sample_rows(rows, 3, 0, "t")
    assert len({row.prompt for row in sample_rows(rows, 99, 0, "t")}) == 5


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_factor(step, 10, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 8)
    assert [rate_factor(step, 2, 1.0) for step in range(2)] == [0.5, 1.0]
    assert rate_factor(0, 1, 0.0) == 1.0


def test_full_training_is_adamw_on_everything(encoder: Encoder) -> None:
    rows = encoder.encode_all([Row(*pair) for pair in COLOURS])
    settings = quick(method="full", accumulation=2, weight_decay=0.1)
    model, wanted = tiny_model(), tiny_model()
    trained = train_task(model, encoder, rows, "t", settings, None)
    assert trained.trained == sum(p.numel() for p in wanted.parameters())

    optimizer = torch.optim.AdamW(wanted.parameters(), lr=1.0, weight_decay=0.1)
    batches = shuffled_batches(rows, 4, 0, "t")
    wanted.train()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * rate_factor(step, 3, 0.1)
        optimizer.zero_grad()
        for _ in range(2):
            (wanted(**encoder.training_batch(next(batches))).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sparse_training_moves_the_selection_only(
    encoder: Encoder, dtype: torch.dtype, checkpointing: bool
) -> None:
    model = tiny_model().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = encoder.encode_all([Row(*pair) for pair in COLOURS])
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    settings = quick(gradient_checkpointing=checkpointing, dtype=name, lr=5e-2)
    selection = Chooser(encoder, settings).select(model, rows, "t", 0)
    trained = train_task(model, encoder, rows, "t", settings, selection)
    assert trained.trained == selection.k
    moved = 0
    for name, parameter in model.named_parameters():
        changed = (parameter.detach() != before[name]).flatten()
        moved += int(changed.sum())
        if name in selection.indices:
            changed[selection.indices[name]] = False
        assert not changed.any(), name
        assert parameter.requires_grad and parameter.grad is None
    assert moved > selection.k / 2


def test_a_loss_that_is_not_finite_stops_the_training(encoder: Encoder) -> None:
    model = tiny_model()
    rows = encoder.encode_all([Row(*pair) for pair in COLOURS])
    selection = Chooser(encoder, quick()).select(model, rows, "t", 0)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="task t: the loss must be finite, got nan at step 1"):
        train_task(model, encoder, rows, "t", quick(), selection)
    assert all(p.requires_grad for p in model.parameters())  # unwrapped
