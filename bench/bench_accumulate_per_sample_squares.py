"""accumulate_per_sample_squares_: SmolLM2's Linear layers, 8 samples of 64 tokens.

Flops: 2 x tokens x out x in, those of the batch's ordinary weight gradient, which is a peer without
the squares: what a backward pays anyway. Bytes: the factors twice (the look for NaN, the packing),
the accumulator read and written. Predicted, one thread, Zen 5 (3.6 GHz, 64 flops a cycle, bfloat16
pairs 128): 576 x 576 in 1.6 ms of float32, 0.9 ms of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.harness import Case, Peer, Target, time_ratio, under_best
from piece_ops import reference

SAMPLES, LENGTH = 8, 64
OURS, BOTH = "piece_ops", "piece_ops, squares and sums"
PLAIN = "torch.mm, the batch's gradient, no squares"
LOOP = "torch.mm a sample, accumulate_squares_"
EINSUM = "torch.einsum, all samples' gradients"
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))


def linear(out: int, features: int, dtype: torch.dtype) -> Case:
    g = torch.Generator().manual_seed(0)
    tokens = SAMPLES * LENGTH
    grad = torch.randn(tokens, out, generator=g).to(dtype)
    x = torch.randn(tokens, features, generator=g).to(dtype)
    offsets = torch.arange(SAMPLES + 1) * LENGTH
    squares, sums = torch.zeros(out, features), torch.zeros(out, features)
    # A part is enough to know a wrong answer, and the reference takes float64.
    rows = slice(0, min(out, 2048))

    def reset() -> None:
        squares.zero_()
        sums.zero_()

    def compare(got: Tensor, want: Tensor, bound: float) -> str | None:
        error = float((got[rows].double() - want).abs().max() / want.abs().max())
        return None if error <= bound else f"off by {error:.1e} of the largest"

    @lru_cache(maxsize=1)
    def exact() -> tuple[Tensor, Tensor]:
        shape = squares[rows].shape
        want = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        reference.accumulate_per_sample_squares_(want[0], grad[:, rows], x, offsets, want[1])
        return want

    def right(bound: float, with_sums: bool = False) -> Callable[[Any], str | None]:
        def check(_: Any) -> str | None:
            want = exact()
            wrong = compare(squares, want[0], bound)
            return wrong or (compare(sums, want[1], bound) if with_sums else None)

        return check

    def loop() -> None:
        for begin, end in pairwise(offsets.tolist()):
            gradient = grad[begin:end].T @ x[begin:end]
            piece_ops.accumulate_squares_(squares, gradient)

    def einsum() -> None:
        each = torch.einsum(
            "nto,nti->noi", grad.view(SAMPLES, LENGTH, -1), x.view(SAMPLES, LENGTH, -1)
        )
        squares.add_(each.float().square_().sum(0))

    def ours() -> None:
        piece_ops.accumulate_per_sample_squares_(squares, grad, x, offsets)

    def both() -> None:
        piece_ops.accumulate_per_sample_squares_(squares, grad, x, offsets, sums)

    # A gradient rounded to bfloat16, as torch's products are, is off by 2^-9, its square by 2^-8
    # and a little; half of that is left for errors that meet.
    in_dtype = 1e-5 if dtype == torch.float32 else 1.5 * 2.0**-8
    n_bytes = 2 * tokens * (out + features) * grad.element_size() + 8 * out * features
    peers = [
        Peer(OURS, ours, right(1e-5), "ours", reset),
        Peer(BOTH, both, right(1e-5, True), "ours", reset, n_bytes=n_bytes + 8 * out * features),
        Peer(PLAIN, lambda: grad.T @ x, lambda got: compare(got, exact()[1], in_dtype)),
        Peer(LOOP, loop, right(in_dtype), reset=reset),
    ]
    if out * features * SAMPLES <= 2**25:  # else gigabytes
        peers.append(Peer(EINSUM, einsum, right(in_dtype), reset=reset))
    targets = [
        Target("time / the ordinary gradient's", time_ratio(OURS, PLAIN), 1.25, at_most=True),
        Target("faster than the loop or einsum", under_best((LOOP, EINSUM), OURS), 1.0, False),
    ]
    name = str(dtype).removeprefix("torch.")
    op = "accumulate_per_sample_squares_"
    return Case(op, name, tokens, n_bytes, peers, targets, peer_seconds=1.5)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    for out, features in SHAPES[:2] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{out} x {features}, {SAMPLES} samples of {LENGTH} tokens, {dtype}"
            yield name.replace("torch.", ""), partial(linear, out, features, dtype)
