"""sparse_adamw_: 0.1 % of 135 M weights, against masked gradients and a dense AdamW.

Bytes of ours: a selected weight moves 8 (index) + 8 + 8 + 8 (master, two moments, in and out) + 4
(gradient) + 4 (weight) = 40 in float32. The gradient and the weight each lie alone in a cache line,
so the memory moves about 230; the share of the bandwidth is of the 40.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.bench_accumulate_squares import copy_floor
from bench.harness import Case, Peer, Target, time_ratio
from bench.inputs import count_elements, random_positions, smollm2_shapes, split_like

OURS, COMPACT = "piece_ops", "piece_ops, compact gradients"
MASKED = "torch: mask gradients, AdamW(fused)"
RATES = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class Sparse:
    """Weights of its own and k-sized state, for ours."""

    def __init__(self, start: list[Tensor], indices: list[Tensor]) -> None:
        self.weights = [w.clone() for w in start]
        self.indices = indices
        self.values = piece_ops.functional.gather(self.weights, indices, dtype=torch.float32)
        self.exp_avgs = [torch.zeros_like(v) for v in self.values]
        self.exp_avg_sqs = [torch.zeros_like(v) for v in self.values]
        self.step_count = 0

    def step(self, grads: list[Tensor]) -> list[Tensor]:
        self.step_count += 1
        piece_ops.sparse_adamw_(
            self.weights,
            self.indices,
            self.values,
            grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            step=self.step_count,
            **RATES,
        )
        return self.weights

    def bytes_per_coordinate(self, *lists: list[Tensor]) -> float:
        k = sum(index.numel() for index in self.indices)
        return sum(t.nbytes for tensors in lists for t in tensors) / k


class Masked:
    """What masking does: dense gradients times a 0/1 mask, a dense fused AdamW."""

    def __init__(self, start: list[Tensor], indices: list[Tensor], grads: list[Tensor]) -> None:
        self.weights = [torch.nn.Parameter(w.clone()) for w in start]
        self.masks = [torch.zeros_like(w) for w in start]
        for mask, index in zip(self.masks, indices, strict=True):
            mask.view(-1)[index] = 1.0
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        self.optimizer = torch.optim.AdamW(self.weights, fused=True, **RATES)

    def step(self) -> list[Tensor]:
        torch._foreach_mul_([w.grad for w in self.weights], self.masks)
        self.optimizer.step()
        return [w.detach() for w in self.weights]


class Indexed:
    """The sparse step in plain torch: index_select, a fused AdamW on the values, index_copy_."""

    def __init__(self, start: list[Tensor], indices: list[Tensor]) -> None:
        self.weights = [w.clone() for w in start]
        self.indices = indices
        pairs = zip(self.weights, indices, strict=True)
        self.values = [torch.nn.Parameter(w.view(-1)[i].float()) for w, i in pairs]
        self.optimizer = torch.optim.AdamW(self.values, fused=True, **RATES)

    def step(self, grads: list[Tensor]) -> list[Tensor]:
        for value, grad, index in zip(self.values, grads, self.indices, strict=True):
            value.grad = grad.view(-1).index_select(0, index).float()
        self.optimizer.step()
        for weight, value, index in zip(self.weights, self.values, self.indices, strict=True):
            weight.view(-1).index_copy_(0, index, value.detach().to(weight.dtype))
        return self.weights


def adamw(shapes: list[tuple[int, ...]], density: float) -> Case:
    n = count_elements(shapes)
    k = int(n * density)
    g = torch.Generator().manual_seed(0)
    start = split_like(torch.randn(n, generator=g), shapes)
    grads = split_like(torch.randn(n, generator=g), shapes)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[random_positions(n, k)] = True
    indices = [part.view(-1).nonzero().flatten() for part in split_like(chosen, shapes)]
    del chosen
    # The reference: one step of AdamW from zero moments, on the selected weights.
    want = []
    for weight, grad, index in zip(start, grads, indices, strict=True):
        p, d = weight.view(-1)[index], grad.view(-1)[index]
        want.append(p - RATES["lr"] * d / (d.abs() + RATES["eps"]))

    def right(weights: list[Tensor]) -> str | None:
        for t, (new, old, index) in enumerate(zip(weights, start, indices, strict=True)):
            if not torch.allclose(new.view(-1)[index], want[t], rtol=1e-6, atol=1e-9):
                return f"selected weights of tensor {t} are not an AdamW step further"
            if int((new != old).sum()) > index.numel():
                return f"unselected weights of tensor {t} moved"
        return None

    compact = piece_ops.functional.gather(grads, indices)
    ours, ours_compact = Sparse(start, indices), Sparse(start, indices)
    masked, indexed = Masked(start, indices, grads), Indexed(start, indices)
    peers = [
        copy_floor(n),
        Peer(OURS, lambda: ours.step(grads), right, "ours", note="gathers from dense gradients"),
        Peer(COMPACT, lambda: ours_compact.step(compact), right, "ours"),
        Peer(MASKED, masked.step, right, n_bytes=40 * n, note="8 bytes of state a weight of all"),
        Peer("torch: index_select, AdamW, index_copy_", lambda: indexed.step(grads), right),
    ]

    def state_bytes(*names: str) -> Any:
        return lambda rows: ours.bytes_per_coordinate(*(getattr(ours, name) for name in names))

    targets = [
        Target("faster than masking", time_ratio(MASKED, OURS), 20.0, at_most=False),
        Target("state", state_bytes("exp_avgs", "exp_avg_sqs"), 8, at_most=True, unit="B"),
        Target("master copy", state_bytes("values"), 4, at_most=True, unit="B"),
    ]
    return Case(
        "sparse_adamw_",
        "fp32",
        n,
        40 * k,
        peers,
        targets,
        peer_seconds=2,
        k=k,
        tensors=len(shapes),
    )


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    shapes = [(1000, 100)] * 20 if quick else smollm2_shapes()
    name = f"0.1 % of {count_elements(shapes) / 1e6:.0f} M, {len(shapes)} tensors"
    yield name, partial(adamw, shapes, 0.001)
