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


@pytest.mark.parametrize("fused", [False, True], ids=["trainer's own AdamW", "SparseAdamW"])
def test_trainer_trains_saves_and_resumes(fused: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # Trainer needs it; piece_ops does not
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[0] for key, value in batch(1, 7, seed=n).items()} for n in range(16)]

    def trainer(folder: str, steps: int) -> tuple[PieceModel, Any]:
        wrapped = wrap(tied=True)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=steps,
            save_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2) if fused else None
        return wrapped, Trainer(
            wrapped, arguments, train_dataset=rows, optimizers=(optimizer, None)
        )

    whole, run = trainer("whole", 4)
    start = whole(**DATA).loss.item()
    run.train()
    _, half = trainer("half", 2)
    half.train()
    resumed, rest = trainer("half", 4)
    rest.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for values, again in zip(whole.values.parameters(), resumed.values.parameters(), strict=True):
        assert torch.equal(values, again)
    assert whole(**DATA).loss.item() != start
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    for name, weight in whole.state_dict().items():
        assert torch.equal(saved[name], weight)


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
