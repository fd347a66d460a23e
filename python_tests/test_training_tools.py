"""PieceModel inside other people's tools: Trainer, DistributedDataParallel, torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from piece_ops.importance import estimate
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW

from helpers.tiny_models import batch, llama

DATA = batch(3, 7, seed=1)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """These models are too small to share; a second thread only waits."""
    torch.set_num_threads(1)


def wrap(**settings: Any) -> PieceModel:
    model = llama(**settings)
    return PieceModel(model, estimate(model, [DATA], "piece-f", density=0.02))


ROWS = [{key: value[0] for key, value in batch(1, 7, seed=n).items()} for n in range(16)]


class Interrupted(Exception):
    pass


def trainer(folder: Path, how: str, **settings: Any) -> Any:
    """A Trainer of a wrapped bfloat16-autocast model with all that goes into a real run."""
    from transformers import Trainer, TrainingArguments

    wrapped = wrap(tied=True)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=1e-2,
        warmup_steps=1,
        weight_decay=0.1,
        max_grad_norm=0.5,
        bf16=True,
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    given: dict[str, Any] = {}
    if how == "optimizers":
        given["optimizers"] = (SparseAdamW(wrapped.parameters(), lr=1e-2), None)
    elif how == "optimizer_cls_and_kwargs":
        given["optimizer_cls_and_kwargs"] = (SparseAdamW, {"lr": 1e-2})
    return Trainer(wrapped, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], **given)


@pytest.mark.parametrize("how", ["trainer's AdamW", "optimizers", "optimizer_cls_and_kwargs"])
def test_trainer_trains_evaluates_saves_and_resumes(how: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # Trainer needs it; piece_ops does not
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise Interrupted

    base = wrap(tied=True).model.state_dict()
    whole = trainer(tmp_path / "whole", how)
    whole.train()
    half = trainer(tmp_path / "half", how)
    half.add_callback(Interrupt())
    with pytest.raises(Interrupted):
        half.train()
    resumed = trainer(tmp_path / "half", how)
    resumed.train(resume_from_checkpoint=True)
    values = dict(whole.model.values.named_parameters())
    for name, again in resumed.model.values.named_parameters():
        assert torch.equal(values[name], again), name
    logged = [
        [entry for entry in t.state.log_history if "eval_loss" in entry] for t in (whole, resumed)
    ]
    assert len(logged[0]) == 3
    for one, two in zip(*logged, strict=True):
        assert one["eval_loss"] == two["eval_loss"]
    assert logged[0][-1]["eval_loss"] < logged[0][0]["eval_loss"]

    best = Path(whole.state.best_model_checkpoint)
    kept = load_file(best / "model.safetensors")
    assert set(kept) == set(whole.model.state_dict())
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(kept[name], weight), name
    delta = whole.model.delta()
    assert 0 < delta.k <= whole.model.selection.k
    plain = whole.model.unload()
    delta.revert_(plain)
    for name, weight in plain.state_dict().items():
        assert torch.equal(base[name], weight), name


def test_data_parallel_reduces_only_the_values(tmp_path: Path) -> None:
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        alone, wrapped = wrap(tied=True), wrap(tied=True)
        parallel = nn.parallel.DistributedDataParallel(wrapped)
        for model, parameters in ((alone, alone.parameters()), (parallel, parallel.parameters())):
            optimizer = SparseAdamW(parameters, lr=1e-2)
            for _ in range(3):
                model(**DATA).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        for one, two in zip(alone.parameters(), wrapped.parameters(), strict=True):
            assert torch.equal(one, two)
    finally:
        dist.destroy_process_group()


def test_compiles_to_one_graph_with_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    wrapped = PieceModel(model, estimate(model, method="magnitude", k=20))
    x = torch.randn(5, 6)
    wrapped(x).square().sum().backward()
    expected = {name: values.grad for name, values in wrapped.values.named_parameters()}
    wrapped.zero_grad()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wrapped, backend=counter)
    compiled(x).square().sum().backward()
    assert counter.frame_count == 1
    for name, values in wrapped.values.named_parameters():
        torch.testing.assert_close(values.grad, expected[name])
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
    optimizer.step()
    assert torch.equal(compiled(x), wrapped(x))
    torch._dynamo.reset()
