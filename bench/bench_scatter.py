"""scatter_: float32 values into 0.1 % of 135 M bfloat16 weights, against index_copy_.

Bytes: 8 (index) + 4 (value) + 2 (target) an index; each target lies alone in a cache line of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.bench_accumulate_squares import copy_floor
from bench.bench_gather import chosen_positions
from bench.harness import Case, Peer
from bench.inputs import count_elements, smollm2_shapes, split_like
from piece_ops.functional import scatter_


def put(shapes: list[tuple[int, ...]]) -> Case:
    n = count_elements(shapes)
    k = n // 1000
    g = torch.Generator().manual_seed(0)
    store = torch.zeros(n, dtype=torch.bfloat16)
    targets, indices = split_like(store, shapes), chosen_positions(shapes, n, k)
    values = [torch.randn(i.numel(), generator=g) + 10 for i in indices]

    def reset() -> None:
        store.zero_()

    def right(_: Any) -> str | None:
        for t, (target, index, value) in enumerate(zip(targets, indices, values, strict=True)):
            if not torch.equal(target.view(-1)[index], value.to(torch.bfloat16)):
                return f"other values in tensor {t}"
        written = int((store != 0).sum())
        return None if written == k else f"{written} elements written instead of {k}"

    def index_copy() -> None:
        for target, index, value in zip(targets, indices, values, strict=True):
            target.view(-1).index_copy_(0, index, value.to(target.dtype))

    peers = [
        copy_floor(n),
        Peer("piece_ops", lambda: scatter_(targets, indices, values), right, "ours", reset),
        Peer("torch.index_copy_", index_copy, right, reset=reset),
    ]
    return Case("scatter_", "fp32 -> bf16", n, 14 * k, peers, k=k, tensors=len(shapes))


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    shapes = [(1000, 100)] * 20 if quick else smollm2_shapes()
    name = f"0.1 % of {count_elements(shapes) / 1e6:.0f} M, {len(shapes)} tensors"
    yield name, partial(put, shapes)
