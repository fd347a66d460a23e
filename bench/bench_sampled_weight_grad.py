"""sampled_weight_grad: 0.1 % of the weight gradients of all Linears of SmolLM2-135M, 512 tokens.

Against the dense GEMM (which leaves the entries to be taken), and GEMM + take. Each distinct shape
has its matrices once, and a call goes over all 211 layers in the model's order, so the matrices of
the layers are in cache and the head's (100 MB of float32 gradients) are not. Two selections: at
random, and as importance scores choose, where a few rows and columns hold most.

Bytes: each used element of both matrices once (at random 44 % of the columns of a square layer).
The floor is a plain read of both matrices, whole: nearly every cache line has a used column. In
bfloat16 on AMX it takes most of a tenth of the GEMM's time.

One layer's time over the density shows where computing everything is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Target, time_ratio
from bench.inputs import random_positions, smollm2_shapes
from piece_ops import _native, reference
from piece_ops.functional import sampled_weight_grad

TOKENS = 512
# float32 sums of 512 products of normal numbers: far above what rounding does, far below an entry.
CLOSE = 1e-4


def linear_shapes() -> list[tuple[int, ...]]:
    """The layers' weights, and the head at the end."""
    embedding, *rest = smollm2_shapes()
    return [*(shape for shape in rest if len(shape) == 2), embedding]


def skewed_positions(out: int, width: int, k: int, seed: int) -> Tensor:
    """The k largest of scores with a heavy-tailed factor for each row and column."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(n, generator=g).exp() for n in (out, width))
    scores = torch.rand(out, width, generator=g) * rows[:, None] * columns
    return scores.view(-1).topk(k).indices.sort().values


class Layers:
    """Inputs of one pass over all layers."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, is_skewed: bool) -> None:
        g = torch.Generator().manual_seed(0)
        self.shapes = shapes
        self.matrices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.indices: list[Tensor] = []
        self.n_bytes = 0
        for number, shape in enumerate(shapes):
            out, width = shape
            if shape not in self.matrices:
                pair = [torch.randn(TOKENS, n, generator=g).to(dtype) for n in (out, width)]
                self.matrices[shape] = (pair[0], pair[1])
            k = max(1, out * width // 1000)
            index = (
                skewed_positions(out, width, k, number)
                if is_skewed
                else random_positions(out * width, k, number)
            )
            self.indices.append(index)
            used = (index // width).unique().numel() + (index % width).unique().numel()
            self.n_bytes += TOKENS * used * dtype.itemsize + 12 * k

    def each(self, compute: Callable[[Tensor, Tensor, Tensor], Any]) -> list[Any]:
        return [
            compute(*self.matrices[shape], index)
            for shape, index in zip(self.shapes, self.indices, strict=True)
        ]


def read(g: Tensor, x: Tensor, indices: Tensor) -> None:
    _native.read_bandwidth_probe(g)
    _native.read_bandwidth_probe(x)


def dense(g: Tensor, x: Tensor, indices: Tensor) -> None:
    g.t() @ x  # dropped at once: all of them together would be the model's size


def take(g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return (g.t() @ x).view(-1)[indices].float()


def wrong(got: list[Tensor], layers: Layers) -> str | None:
    """Compare one layer of each shape with float64."""
    seen = set()
    for values, shape, index in zip(got, layers.shapes, layers.indices, strict=True):
        if shape in seen:
            continue
        seen.add(shape)
        rows = index // shape[1]
        first = int(rows[len(rows) // 2])  # of a head, some rows are enough
        some = (rows >= first) & (rows < first + 600)
        g, x = layers.matrices[shape]
        part = index[some] - first * shape[1]
        want = reference.sampled_weight_grad(g[:, first : first + 600], x, part)
        if not torch.allclose(values[some].double(), want, rtol=CLOSE, atol=CLOSE):
            return f"other values in {shape}"
    return None


def all_layers(shapes: list[tuple[int, ...]], dtype: torch.dtype, is_skewed: bool) -> Case:
    layers = Layers(shapes, dtype, is_skewed)
    peers = [
        Peer(
            "piece_ops",
            lambda: layers.each(sampled_weight_grad),
            lambda got: wrong(got, layers),
            "ours",
        ),
        Peer("one read of both matrices", lambda: layers.each(read), role="floor"),
        Peer("dense GEMM", lambda: layers.each(dense)),
        Peer("dense GEMM + take", lambda: layers.each(take)),
    ]
    name = str(dtype).removeprefix("torch.")
    n = sum(index.numel() for index in layers.indices)
    faster = Target("faster than the dense GEMM", time_ratio("dense GEMM", "piece_ops"), 10, False)
    return Case("sampled_weight_grad", name, n, layers.n_bytes, peers, [faster], peer_seconds=1.5)


def one_density(density: float, dtype: torch.dtype) -> Case:
    out, width = 1536, 576
    g = torch.Generator().manual_seed(0)
    grads, x = (torch.randn(TOKENS, n, generator=g).to(dtype) for n in (out, width))
    indices = random_positions(out * width, round(density * out * width))
    want = reference.sampled_weight_grad(grads, x, indices)

    def right(got: Tensor) -> str | None:
        close = torch.allclose(got.double(), want, rtol=CLOSE, atol=CLOSE)
        return None if close else "other values"

    def float32_take() -> Tensor:
        return (grads.float().t() @ x.float()).view(-1)[indices]

    peers = [
        Peer("piece_ops", lambda: sampled_weight_grad(grads, x, indices), right, "ours"),
        Peer("float32 GEMM + take", float32_take, right),
    ]
    name = str(dtype).removeprefix("torch.")
    n_bytes = TOKENS * (out + width) * dtype.itemsize + 12 * indices.numel()
    return Case("sampled_weight_grad", name, indices.numel(), n_bytes, peers)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    shapes = [(192, 576), (576, 192)] if quick else linear_shapes()
    what = f"0.1 % of {len(shapes)} Linears, {TOKENS} tokens"
    for dtype in (torch.float32, torch.bfloat16):
        for is_skewed in (False, True):
            how = "in few rows and columns" if is_skewed else "at random"
            kind = str(dtype).removeprefix("torch.")
            yield f"{what}, {how}, {kind}", partial(all_layers, shapes, dtype, is_skewed)
    for density in (1e-3,) if quick else (1e-4, 1e-3, 1e-2, 1e-1, 0.3, 1.0):
        yield f"1536 x 576, {100 * density:g} %", partial(one_density, density, torch.float32)
