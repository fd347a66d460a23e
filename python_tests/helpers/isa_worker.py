"""Run one batch of generated cases of every op and print, as JSON, a digest per group.

Started by test_isa.py once per instruction set (PIECE_OPS_ISA is read once per process). The inputs
come from fixed seeds, so equal digests mean equal bits: of the results, and of the inputs too.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from piece_ops import _native
from piece_ops import functional as ops
from piece_ops.backends import cpu

from helpers.cases import (
    BF16,
    DISTRIBUTIONS,
    DTYPES,
    EDGE_SIZES,
    F16,
    F32,
    NAN_DISTRIBUTIONS,
    cut,
    draw,
    pick,
    select_cases,
    some_positions,
)
from helpers.compare import bits

FINITE = ("normal", "zeros_99", "signed_zeros", "subnormal_mixed", "lognormal4")


class Digest:
    """SHA-256 over the bytes of tensors and the repr of everything else, in order."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def add(self, *things: Any) -> None:
        for thing in things:
            if isinstance(thing, Tensor):
                self.add(str(thing.dtype), tuple(thing.shape))
                self.hash.update(bits(thing).numpy().tobytes())
            elif isinstance(thing, dict):
                self.add(*thing.keys(), *thing.values())
            elif isinstance(thing, (list, tuple)):
                self.add(*thing)
            else:
                self.hash.update(repr(thing).encode())


def select_topk(digest: Digest) -> None:
    g = torch.Generator().manual_seed(11)
    for dtype in (*DTYPES.values(), None):
        for name in DISTRIBUTIONS:
            for case in select_cases(dtype, name, g, (*EDGE_SIZES[::3], 10_007)):
                top = ops.select_topk(case.scores, case.k, **case.options)
                digest.add(case.name, top.indices, top.threshold, top.ties_kept)
    for name in DISTRIBUTIONS:
        scores = draw(name, 2**18 + 3, pick(g, (F32, BF16, F16)), g)
        nan = "lowest" if name in NAN_DISTRIBUTIONS else "raise"
        for algorithm in ("filter", "radix"):
            top = ops.select_topk(scores, 2**18 // 1000, nan=nan, algorithm=algorithm)
            digest.add(top.indices, top.threshold, top.ties_kept)


def scores(digest: Digest) -> None:
    g = torch.Generator().manual_seed(12)
    for kind in ("piece-s", "piece-g", "magnitude", "snip", "taylor", "random"):
        for n in (0, 17, 1025, 100_003):
            for first_dtype, second_dtype in ((F32, F32), (BF16, F32), (F32, BF16), (F16, F16)):
                first = cut(draw("normal", n, F32, g), 4, g)
                second = [draw("normal", p.numel(), F32, g).abs().reshape(p.shape) for p in first]
                one = ops.Score(
                    kind,
                    [p.to(first_dtype) for p in first],
                    None
                    if kind in ("magnitude", "random")
                    else [q.to(second_dtype) for q in second],
                    constant=0.25 if kind.startswith("piece") else 0.0,
                    seed=n,
                )
                for algorithm in ("filter", "radix"):
                    top = ops.select_topk(one, n // 10, algorithm=algorithm)
                    digest.add(kind, top.indices, top.threshold, top.ties_kept)


def accumulate_squares_(digest: Digest) -> None:
    g = torch.Generator().manual_seed(13)
    for dtype in (F32, BF16, F16):
        for name in FINITE[:4]:
            grads = [draw(name, n, dtype, g) for n in (*EDGE_SIZES, 70_001)]
            squares = [torch.rand(x.shape, generator=g) for x in grads]
            sums = [torch.randn(x.shape, generator=g) for x in grads]
            ops.accumulate_squares_(squares, grads, sums=sums, weight=1 / 3)
            ops.accumulate_squares_(squares, grads)
            ops.accumulate_squares_(None, grads, sums=sums, weight=0.1)
            digest.add(squares, sums)


def sparse_adamw_(digest: Digest) -> None:
    g = torch.Generator().manual_seed(14)
    for dtype in (F32, BF16, F16):
        for grad_dtype in (F32, BF16, F16):
            weights = [torch.randn(n, generator=g).to(dtype) for n in (*EDGE_SIZES, 70_001)]
            indices = [some_positions(w.numel(), 0.3, g) for w in weights]
            values = ops.gather(weights, indices, dtype=F32)
            m = [torch.zeros_like(v) for v in values]
            v = [torch.zeros_like(v) for v in values]
            for step in (1, 2, 50):
                sizes = [t.numel() for t in (weights if step == 2 else indices)]
                grads = [draw("normal", n, grad_dtype, g) for n in sizes]
                ops.sparse_adamw_(weights, indices, values, grads, m, v, step=step, lr=1e-3)
            digest.add(weights, values, m, v)


def gather_scatter_total(digest: Digest) -> None:
    g = torch.Generator().manual_seed(15)
    for dtype in DTYPES.values():
        for name in FINITE:
            tensors = [draw(name, n, dtype, g) for n in (*EDGE_SIZES, 70_001)]
            indices = [some_positions(t.numel(), 0.2, g) for t in tensors]
            digest.add(ops.gather(tensors, indices), ops.total(tensors))
            digest.add([ops.total(t) for t in tensors])
            if dtype != torch.float64:
                digest.add(ops.gather(tensors, indices, dtype=F32))
                values = [draw("lognormal4", i.numel(), F32, g) for i in indices]
                ops.scatter_(tensors, indices, values)
            else:
                ops.scatter_(
                    tensors, indices, [t[i] for t, i in zip(tensors, indices, strict=True)]
                )
            digest.add(tensors)


def sampled_weight_grad(digest: Digest) -> None:
    g = torch.Generator().manual_seed(16)
    for dtype in (F32, BF16, F16):
        for name in FINITE[:4]:  # the last overflows float16, and NaN has no fixed bits
            for tokens, out, width in ((33, 20, 17), (600, 300, 50), (257, 7, 1000)):
                grads = draw(name, tokens * out, dtype, g).view(tokens, out)
                x = draw("normal", tokens * width, pick(g, (F32, BF16, F16)), g)
                for share in (0.01, 0.3):
                    indices = some_positions(out * width, share, g)
                    digest.add(ops.sampled_weight_grad(grads, x.view(tokens, width), indices))


def add_rounded_(digest: Digest) -> None:
    g = torch.Generator().manual_seed(17)
    for name in FINITE:
        for n in (*EDGE_SIZES, 70_001):
            target, value = draw(name, n, BF16, g), draw("lognormal4", n, F32, g)
            for begin in (0, 2**32 - n // 2):
                digest.add(cpu.add_rounded_(target, value, n, begin), target)


GROUPS: tuple[Callable[[Digest], None], ...] = (
    select_topk,
    scores,
    accumulate_squares_,
    sparse_adamw_,
    gather_scatter_total,
    sampled_weight_grad,
    add_rounded_,
)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    digests = {}
    for group in GROUPS:
        digest = Digest()
        group(digest)
        digests[group.__name__] = digest.hash.hexdigest()
    print(json.dumps({"isa": _native.describe()["isa"], "digests": digests}))


if __name__ == "__main__":
    main()
