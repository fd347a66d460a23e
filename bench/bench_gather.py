"""gather: 0.1 % of 135 M bfloat16 weights into float32, against index_select.

Bytes: 8 (index) + 2 (source) + 4 (value) an index; each source lies alone in a cache line of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.bench_accumulate_squares import copy_floor
from bench.harness import Case, Peer
from bench.inputs import count_elements, random_positions, smollm2_shapes, split_like
from piece_ops.functional import gather


def chosen_positions(shapes: list[tuple[int, ...]], n: int, k: int) -> list[Tensor]:
    """k positions among n, as positions inside each tensor."""
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[random_positions(n, k)] = True
    return [part.view(-1).nonzero().flatten() for part in split_like(chosen, shapes)]


def take(shapes: list[tuple[int, ...]]) -> Case:
    n = count_elements(shapes)
    k = n // 1000
    g = torch.Generator().manual_seed(0)
    sources = split_like(torch.randn(n, generator=g).to(torch.bfloat16), shapes)
    indices = chosen_positions(shapes, n, k)
    want = [s.view(-1)[i].float() for s, i in zip(sources, indices, strict=True)]

    def right(got: Any) -> str | None:
        return None if all(map(torch.equal, got, want)) else "other values"

    def index_select() -> list[Tensor]:
        pairs = zip(sources, indices, strict=True)
        return [s.view(-1).index_select(0, i).float() for s, i in pairs]

    peers = [
        copy_floor(n),
        Peer("piece_ops", lambda: gather(sources, indices, dtype=torch.float32), right, "ours"),
        Peer("torch.index_select", index_select, right),
    ]
    return Case("gather", "bf16 -> fp32", n, 14 * k, peers, k=k, tensors=len(shapes))


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    shapes = [(1000, 100)] * 20 if quick else smollm2_shapes()
    name = f"0.1 % of {count_elements(shapes) / 1e6:.0f} M, {len(shapes)} tensors"
    yield name, partial(take, shapes)
