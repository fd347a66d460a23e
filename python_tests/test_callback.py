"""PieceCallback in transformers' Trainer: deltas at saves and at the end, selecting again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piece_ops.delta import Delta
from piece_ops.importance import estimate
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection
from piece_ops.training.callback import PieceCallback

from helpers.tiny_models import batch, llama

pytest.importorskip("accelerate")  # Trainer needs it; piece_ops does not

ROWS = [{key: value[0] for key, value in batch(1, 7, seed=n).items()} for n in range(16)]


def by_gradient(model: nn.Module) -> Selection:
    return estimate(model, [batch(8, 7, seed=3)], "gradient", density=0.02)


def wrap() -> PieceModel:
    model = llama()
    return PieceModel(model, estimate(model, method="magnitude", density=0.02))


def trainer(folder: Path, callback: PieceCallback, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=6,
        lr_scheduler_type="linear",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )
    return Trainer(
        wrap(),
        arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        optimizer_cls_and_kwargs=(SparseAdamW, {"lr": 1e-2}),
        callbacks=[callback],
    )


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def test_the_delta_is_saved_at_saves_and_of_the_best_model_at_the_end(tmp_path: Path) -> None:
    seen = []

    class Watched(PieceCallback):
        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            super().on_save(args, state, control, **given)
            seen.append(Delta.from_pretrained(tmp_path).digest)

    run = trainer(
        tmp_path,
        Watched("mail"),
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the loss falls, so the first checkpoint is the best
    )
    run.train()
    assert len(seen) == 3 and seen[0] == seen[2] != seen[1]
    delta = Delta.from_pretrained(tmp_path)
    assert delta.task == "mail" and delta.k == run.model.selection.k
    again = PieceModel.from_pretrained(llama(), tmp_path)
    assert_same(run.model.model.state_dict(), again.model.state_dict())


def test_it_selects_again_and_the_optimizer_goes_on(tmp_path: Path) -> None:
    calls = []

    def select(model: nn.Module) -> Selection:
        calls.append(by_gradient(model))
        return calls[-1]

    run = trainer(tmp_path, PieceCallback("law", refresh=2, select=select), weight_decay=0.1)
    base = {name: p.detach().clone() for name, p in run.model.model.named_parameters()}
    run.train()
    assert len(calls) == 2  # after steps 2 and 4; not after the last one
    assert run.model.selection is calls[1]
    optimizer = run.optimizer.optimizer
    held = {id(v) for group in optimizer.param_groups for v in group["params"]}
    assert held == {id(values) for values in run.model.values.parameters()}
    assert set(map(id, optimizer.state)) == held
    steps = {optimizer.state[v]["step"] for v in run.model.values.parameters()}
    assert max(steps) == 6 and min(steps) >= 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] < 1e-2  # the schedule reaches it
    delta = Delta.from_pretrained(tmp_path)
    plain = run.model.unload()
    delta.revert_(plain)
    assert_same(base, dict(plain.named_parameters()))


def test_bad_use_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refresh and select must be given together"):
        PieceCallback(refresh=3)
    with pytest.raises(ValueError, match="refresh must be a positive number of steps, got 0"):
        PieceCallback(refresh=0, select=by_gradient)
    callback = PieceCallback(refresh=2, select=by_gradient)
    best = {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="load_best_model_at_end must be off with refresh"):
        trainer(tmp_path, callback, **best).train()
    run = trainer(tmp_path, callback)
    run.optimizer_cls_and_kwargs = None
    with pytest.raises(TypeError, match="the optimizer must be a SparseAdamW, got AdamW"):
        run.train()
    run = trainer(tmp_path, PieceCallback())
    run.model = run.model.unload()
    with pytest.raises(TypeError, match=r"model must be a PieceModel, got .*LlamaForCausalLM"):
        run.callback_handler.model = run.model
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
