"""accumulate_squares_: bfloat16 gradients of 135 M parameters into float32, against a copy.

Bytes: 2 (gradient) + 4 + 4 (accumulator, read and written) an element; with sums 8 more. The copy
that gives the bandwidth reads and writes 4 + 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.harness import Absent, Case, Peer, Target, share_of_bandwidth, under_best
from bench.inputs import count_elements, smollm2_shapes, split_like

OURS, BOTH = "piece_ops", "piece_ops, squares and sums"
FOREACH = ("torch._foreach, float32 buffer", "torch, cast per tensor")


def copy_floor(n: int) -> Peer:
    source, target = torch.ones(n), torch.zeros(n)
    return Peer("copy_", lambda: target.copy_(source), role="floor", n_bytes=8 * n)


def accumulate(shapes: list[tuple[int, ...]]) -> Case:
    n = count_elements(shapes)
    g = torch.Generator().manual_seed(0)
    grads = split_like(torch.randn(n, generator=g).to(torch.bfloat16), shapes)
    store, sum_store, buffer_store = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    squares, sums = split_like(store, shapes), split_like(sum_store, shapes)
    buffers = split_like(buffer_store, shapes)

    def reset() -> None:
        store.zero_()

    def right(_: Any) -> str | None:
        """From zero, one call must leave exactly g * g in float32."""
        for t, (square, grad) in enumerate(zip(squares, grads, strict=True)):
            if not torch.equal(square, grad.float().square_()):
                return f"square sums of tensor {t} are not g * g"
        return None

    def foreach() -> None:
        torch._foreach_copy_(buffers, grads)
        torch._foreach_addcmul_(squares, buffers, buffers)

    def cast() -> None:
        for square, grad in zip(squares, grads, strict=True):
            wide = grad.float()
            square.addcmul_(wide, wide)

    def both() -> None:
        piece_ops.accumulate_squares_(squares, grads, sums=sums)

    inductor = compiled(squares, grads)
    peers = [
        copy_floor(n),
        Peer(OURS, lambda: piece_ops.accumulate_squares_(squares, grads), right, "ours", reset),
        Peer(BOTH, both, right, "ours", reset, n_bytes=18 * n),
        Peer(FOREACH[0], foreach, right, reset=reset, note="4 bytes an element of buffer, kept"),
        Peer(FOREACH[1], cast, right, reset=reset),
        Peer("torch.compile", inductor, right, reset=reset, prepare=inductor),
    ]
    targets = [
        Target("bandwidth / a copy's", share_of_bandwidth(OURS), 85, at_most=False, unit="%"),
        Target("faster than torch._foreach", under_best(FOREACH, OURS), 2.0, at_most=False),
    ]
    return Case(
        "accumulate_squares_",
        "bf16 -> fp32",
        n,
        10 * n,
        peers,
        targets,
        peer_seconds=1.5,
        tensors=len(shapes),
    )


def compiled(squares: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    """One fused loop per tensor by Inductor, compiled once for all shapes."""

    def add(square: Tensor, grad: Tensor) -> None:
        wide = grad.float()
        square.add_(wide * wide)

    function = torch.compile(add, dynamic=True, fullgraph=True)

    def run() -> None:
        try:
            for square, grad in zip(squares, grads, strict=True):
                function(square.view(-1), grad.view(-1))
        except Exception as error:  # no compiler, or a version that cannot
            raise Absent(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    return run


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    shapes = [(1000, 100)] * 20 if quick else smollm2_shapes()
    name = f"{count_elements(shapes) / 1e6:.0f} M, {len(shapes)} tensors"
    yield name, partial(accumulate, shapes)
