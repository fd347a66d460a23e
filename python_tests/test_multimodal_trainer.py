"""Vision-language models in transformers' Trainer, the vision tower frozen: train, save, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

from piece_ops import Delta, PieceModel, SparseAdamW, estimate
from piece_ops.training.callback import PieceCallback

from helpers.tiny_vision import TOWER, VISION_MODELS, sample

ROWS, STEPS = 12, 6


def frozen_tower(kind: str) -> Any:
    """A model whose vision tower does not train."""
    model = VISION_MODELS[kind]()
    for name, parameter in model.named_parameters():
        if f".{TOWER[kind]}." in name:
            parameter.requires_grad_(False)
    return model


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Images and texts of several samples: their patches lie one after another (Qwen-VL)."""
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def trained(
    kind: str, out: Path, steps: int, resume: bool = False
) -> tuple[PieceModel, dict[str, float]]:
    """The wrapped model after training, and what evaluation found."""
    model = frozen_tower(kind)
    rows = [sample(model, seed) for seed in range(ROWS)]
    wrapped = PieceModel(model, estimate(model, rows, "piece-f", density=0.01))
    trainer = Trainer(
        wrapped,
        TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows,  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=(SparseAdamW, {"lr": 1e-2}),
        callbacks=[PieceCallback(task="squares")],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume)
    return wrapped, {"before": before, "after": trainer.evaluate()["eval_loss"]}


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_a_trainer_trains_saves_little_and_resumes_with_the_same_bits(
    kind: str, tmp_path: Path
) -> None:
    base = {name: p.detach().clone() for name, p in VISION_MODELS[kind]().named_parameters()}
    whole, loss = trained(kind, tmp_path / "whole", STEPS)
    assert loss["after"] < loss["before"]

    chosen = whole.selection.indices
    assert chosen and not any(f".{TOWER[kind]}." in name for name in chosen)
    moved = 0
    for name, weight in whole.model.named_parameters():
        changed = torch.nonzero((weight != base[name]).flatten()).flatten()
        moved += changed.numel()
        if changed.numel():
            assert bool(torch.isin(changed, chosen[name]).all()), name
    assert moved > 0.9 * whole.selection.k

    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS}"
    weights = (checkpoint / "model.safetensors").stat().st_size
    values = 12 * whole.selection.k  # float32 values and int64 positions
    assert weights < values + 1000 * len(chosen) + 4096
    assert weights + (checkpoint / "optimizer.pt").stat().st_size < 4 * sum(
        weight.numel() for weight in base.values()
    )

    trained(kind, tmp_path / "half", STEPS - 2)
    resumed, _ = trained(kind, tmp_path / "half", STEPS, resume=True)
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name

    delta = Delta.from_pretrained(tmp_path / "whole")
    assert delta.task == "squares"
    plain = VISION_MODELS[kind]()
    delta.apply_(plain)
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, whole.model.get_parameter(name)), name
