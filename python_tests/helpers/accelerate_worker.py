"""What one process of an accelerate run does, with the environment that a launcher gives it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from piece_ops import SparseAdamW

from helpers.data_parallel_worker import ROWS, STEPS, result, rows, wrapped_model

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = ["--density", "0.01", "--lr", "1e-2"]


def train_together() -> dict[str, Any]:
    """The steps of `train_alone`: accelerate deals out the rows of each joint batch."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    wrapped = wrapped_model()
    dealt = [
        {key: part[row] for key, part in rows(seed, 0, ROWS).items()}
        for seed in range(STEPS)
        for row in (0, 2, 1, 3)  # rank r gets every second batch: rows r, r + 2
    ]
    loader: Any = DataLoader(dealt, ROWS // 2)  # type: ignore[arg-type]
    optimizer: Any = SparseAdamW(wrapped.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(wrapped, optimizer, loader)
    assert isinstance(model, DistributedDataParallel)
    sent: list[int] = []

    def hook(state, bucket):  # DDP checks annotations, and does not read them as text
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    seen = 0
    for batch in loader:
        seen += len(batch["input_ids"])
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {**result(wrapped), "bytes": sent, "rows": seen}


def run_example(folder: Path, *more: str) -> dict[str, Any]:
    """examples/accelerate_loop.py, as in a process of its own."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    sys.path.insert(0, str(EXAMPLES))
    example = importlib.import_module("accelerate_loop")
    return result(example.main([*OPTIONS, "--out", str(folder), *more]))


def work(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    try:
        found = {
            "loop": train_together(),
            "whole": run_example(folder / "whole"),
            "half": run_example(folder / "half", "--steps", "4"),
            "resumed": run_example(folder / "half", "--resume"),
        }
        torch.save(found, folder / f"rank{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
