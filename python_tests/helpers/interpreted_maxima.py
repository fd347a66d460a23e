"""For a process with TRITON_INTERPRET=1: the maxima that the per-sample kernel's epilogue leaves.

Ends with 0 if all are bounds of the scores, and those of square sums and sums exactly the largest.
"""

from __future__ import annotations

import sys

import torch

from piece_ops.backends.triton import accumulate_per_sample_squares as kernel


def check(kind: str, out: int, features: int, middle: int, g: torch.Generator) -> None:
    grad, x = torch.randn(50, out, generator=g), torch.randn(50, features, generator=g)
    squares, sums = torch.rand(out, features, generator=g), torch.randn(out, features, generator=g)
    sums[0, 0], squares[1, 3] = float("nan"), float("inf")
    to = torch.full((out * features // 32,), -7.0)
    kernel.accumulate_per_sample_squares_(
        squares,
        grad,
        x,
        torch.tensor([0, middle, 50]),
        sums,
        None,
        kernel.Tiling(16, 32, 4, 3),
        kernel.Maxima(to, kind, 0.25),
        is_finite=True,
    )
    # As select_topk computes it: float32, rounded correctly.
    root = (squares + 0.25).double().sqrt().float()
    score = {"plain": squares, "magnitude": sums.abs(), "piece-s": sums.abs() / root}[kind]
    want = score.nan_to_num(torch.inf, posinf=torch.inf).view(-1, 32).amax(1)
    if kind == "piece-s":
        assert bool((to >= want).all()), f"{kind} {out} x {features}: too small"
        finite = want.isfinite()
        assert bool((to[finite] <= want[finite] * 1.00001 + 1e-30).all()), f"{kind}: far too large"
    else:
        assert torch.equal(to, want), f"{kind} {out} x {features}"


def main() -> int:
    g = torch.Generator().manual_seed(1)
    for kind in kernel.MAXIMA_OF:
        for out, features in ((2, 32), (33, 96), (40, 64)):
            for middle in (20, 25):  # samples as long as each other: with descriptors
                check(kind, out, features, middle, g)
    print("maxima are right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
