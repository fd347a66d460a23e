"""``python -m bench.cuda --sweep``: constants chosen by prediction, tried on the GPU at hand.

full rows   the share of a row from which "by products" is the faster way:
            `SHARE` of piece_ops/backends/cuda_full_rows.py.
tilings     the fastest for samples of many and of few tokens, and where they cross: `TMA_TILING`,
            `TMA_TILING_HALF` and `FEW_TOKENS` of
            piece_ops/backends/triton/accumulate_per_sample_squares.py.

Answers are checked before they are timed. What is predicted is the dense product. Not yet run
on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.cuda_others import Samples
from bench.cuda_timing import Peer, Plan, Run
from piece_ops.backends import cuda_full_rows as full

ONE_BY_ONE, PRODUCTS = "one by one", "by products"
SHARES = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05)
FLOP_PER_MS = {torch.bfloat16: 600e9, torch.float32: 50e9}
LENGTHS = (64, 128, 256, 512, 1024)
Shape = tuple[int, int, int, int]  # out, in, warps, stages
TILINGS: tuple[Shape, ...] = (
    (128, 128, 8, 3),
    (128, 128, 8, 4),
    (128, 128, 8, 5),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
    (64, 128, 4, 4),
    (256, 64, 8, 4),
)


def rows_whole(run: Run, always: bool) -> Run:
    """The call with every row computed whole, or with none; it has plans of its own."""
    own = (1 if always else 1 << 62, dict.fromkeys((2, 4), 1e-9), {})

    def call() -> Tensor:
        usual = full.LEAST, full.SHARE, full._plans
        full.LEAST, full.SHARE, full._plans = own
        try:
            return run()
        finally:
            full.LEAST, full.SHARE, full._plans = usual

    return call


def full_rows(
    out: int, width: int, tokens: int, share: float, filled: float, dtype: torch.dtype
) -> list[Peer]:
    """A weight's gradient at a share of the entries of its first rows."""
    torch.manual_seed(0)
    g, x = (torch.randn(tokens, n, device="cuda").to(dtype) for n in (out, width))
    wanted = torch.rand(out, width, device="cuda") < share
    wanted[int(out * filled) :] = False
    indices = wanted.view(-1).nonzero().view(-1)

    def run() -> Any:
        return piece_ops.sampled_weight_grad(g, x, indices)

    one_by_one, products = (rows_whole(run, always) for always in (False, True))
    expected = one_by_one()

    def check(got: Tensor) -> str | None:
        error = float((got - expected).abs().max() / expected.abs().max())
        return None if error < 1e-4 else f"off by {error:.1e} of the largest"

    return [
        Peer("dense GEMM", lambda: g.t() @ x),
        Peer(ONE_BY_ONE, one_by_one, check, role="ours"),
        Peer(PRODUCTS, products, check, role="ours"),
    ]


def tilings(
    out: int, width: int, samples: int, length: int, shapes: Sequence[Shape], with_sums: bool
) -> list[Peer]:
    """The kernel alone, without the look at its factors."""
    from piece_ops.backends.triton import accumulate_per_sample_squares as kernel

    data = Samples.of(out, width, samples, length)
    offsets = data.offsets.tolist()
    sums = data.sums if with_sums else None

    def launch(shape: Shape) -> None:
        tiling = kernel.Tiling(*shape)
        kernel.launch(data.squares, data.grad, data.x, offsets, sums, None, tiling)

    return [data.product()] + [
        Peer(
            "{} x {}, {} warps, {} stages".format(*shape),
            partial(launch, shape),
            data.check,
            role="ours",
            prepare=data.squares.zero_,
        )
        for shape in shapes
    ]


def plans() -> Iterator[Plan]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for *layer, filled, dtype, shares in (
        (4096, 4096, 8192, 1.0, bf16, SHARES[:-2]),
        (14336, 4096, 8192, 1.0, bf16, SHARES[:6]),
        (4096, 14336, 8192, 1.0, bf16, SHARES[:6]),
        (4096, 4096, 8192, 0.1, bf16, SHARES[2:-2]),  # a tenth of the rows, then the rest
        (576, 576, 512, 1.0, bf16, SHARES[3:-2]),
        (4096, 4096, 2048, 1.0, fp32, SHARES[2:]),
    ):
        out, width, tokens = layer
        name = str(dtype).removeprefix("torch.")
        for share in shares:
            yield Plan(
                "full rows",
                f"{out} x {width}, {tokens} tokens, {name}, {share:.2%} of {filled:.0%} of rows",
                int(out * width * filled * share),
                dtype.itemsize * tokens * (out + width),
                targets=[],
                more_ms=2 * tokens * out * width / FLOP_PER_MS[dtype],
                build=partial(full_rows, out, width, tokens, share, filled, dtype),
                dtype=name,
            )
    for length in LENGTHS:
        for with_sums in (False, True):
            what = "squares and sums" if with_sums else "squares"
            yield Plan(
                "tilings",
                f"4096 x 4096, {8192 // length} samples of {length} tokens, {what}",
                4096 * 4096,
                4 * 8192 * 4096 + (16 if with_sums else 8) * 4096 * 4096,
                targets=[],
                more_ms=2 * 8192 * 4096 * 4096 / FLOP_PER_MS[bf16],
                build=partial(tilings, 4096, 4096, 8192 // length, length, TILINGS, with_sums),
            )
