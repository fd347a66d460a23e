"""What one process of a data-parallel run does; started by test_data_parallel.py."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from piece_ops import PieceModel, Selection, SparseAdamW

from helpers.tiny_models import batch, llama, random_positions

STEPS, ROWS = 4, 4  # rows of the joint batch


def wrapped_model() -> PieceModel:
    model = llama(tied=True)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    return PieceModel(model, Selection(random_positions(model, 0.05), shapes, total))


def rows(seed: int, start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[start:stop] for key, value in batch(ROWS, 7, seed=seed).items()}


def result(wrapped: PieceModel) -> dict[str, dict[str, Tensor]]:
    return {
        "values": {n: v.detach().clone() for n, v in wrapped.values.named_parameters()},
        "weights": {n: p.detach().clone() for n, p in wrapped.model.named_parameters()},
    }


def train_alone() -> dict[str, Any]:
    """On the joint batches, in this process."""
    wrapped = wrapped_model()
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-2)
    for seed in range(STEPS):
        wrapped(**rows(seed, 0, ROWS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(wrapped)


def train_together(rank: int, world: int, micro_batches: int) -> dict[str, Any]:
    """On this rank's share of the joint batches; also the bytes of every all-reduce."""
    wrapped = wrapped_model()
    parallel = DistributedDataParallel(wrapped)
    sent: list[int] = []

    def hook(state, bucket):  # DDP checks annotations, and does not read them as text
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    parallel.register_comm_hook(None, hook)
    optimizer = SparseAdamW(parallel.parameters(), lr=1e-2)
    share = ROWS // world
    size = share // micro_batches
    for seed in range(STEPS):
        for part in range(micro_batches):
            is_last = part == micro_batches - 1
            start = rank * share + part * size
            with nullcontext() if is_last else parallel.no_sync():
                loss = parallel(**rows(seed, start, start + size)).loss / micro_batches
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = parallel.state_dict()
    parallel.load_state_dict(state)
    return {**result(wrapped), "bytes": sent, "keys": list(state)}


def count_collectives(rank: int, world: int, broadcast_buffers: bool) -> list[tuple[str, int]]:
    """Every collective of one step, with its elements; DDP has arranged its buckets before."""
    wrapped = wrapped_model()
    parallel = DistributedDataParallel(wrapped, broadcast_buffers=broadcast_buffers)
    optimizer = SparseAdamW(parallel.parameters(), lr=1e-2)
    share = ROWS // world

    def step(seed: int) -> None:
        parallel(**rows(seed, rank * share, (rank + 1) * share)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)  # the buckets are made anew here, once
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step(2)
    found = []
    for event in profiled.events():
        if event.name.startswith("gloo:"):
            shapes = [torch.Size(shape).numel() for shape in event.input_shapes]
            found.append((event.name.removeprefix("gloo:"), sum(shapes)))
    assert len(found) == sum(event.name.startswith("c10d::") for event in profiled.events())
    return found


class Branches(nn.Module):
    """One of two layers is used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


def train_branches(rank: int) -> dict[str, Any]:
    model = Branches()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    chosen = Selection(random_positions(model, 0.5), shapes, 40)
    wrapped = PieceModel(model, chosen)
    parallel = DistributedDataParallel(wrapped, find_unused_parameters=True)
    for _ in range(2):
        parallel(torch.full((2, 4), 1.0 + rank)).square().sum().backward()
    return {n: v.grad for n, v in wrapped.values.named_parameters()}


def work(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=world
    )
    try:
        found = {
            "plain": train_together(rank, world, 1),
            "no_sync": train_together(rank, world, 2),
            "branches": train_branches(rank),
            "collectives": [count_collectives(rank, world, flag) for flag in (False, True)],
        }
        torch.save(found, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
