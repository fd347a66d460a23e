"""total: the float64 sum of 135 M float32 numbers in 272 tensors, against torch.sum.

Bytes: each number once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.bench_select_topk import floors
from bench.harness import Case, Peer
from bench.inputs import count_elements, gaussian_squared, smollm2_shapes, split_like
from piece_ops.functional import total


def add_up(shapes: list[tuple[int, ...]]) -> Case:
    n = count_elements(shapes)
    flat = gaussian_squared(n)
    parts = split_like(flat, shapes)
    want = float(flat.numpy().sum(dtype="float64"))

    def right(got: float) -> str | None:
        return None if abs(got - want) <= 1e-12 * want else f"{got!r} instead of {want!r}"

    def torch_sum() -> float:
        return float(sum(part.sum(dtype=torch.float64) for part in parts))

    peers = [
        *floors([flat]),
        Peer("piece_ops", lambda: total(parts), right, "ours"),
        Peer("torch.sum, float64", torch_sum, right),
    ]
    return Case("total", "fp32", n, 4 * n, peers, tensors=len(shapes))


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    shapes = [(1000, 100)] * 20 if quick else smollm2_shapes()
    name = f"{count_elements(shapes) / 1e6:.0f} M, {len(shapes)} tensors"
    yield name, partial(add_up, shapes)
