"""Products over samples, gather, scatter and total on a GPU: plans and their peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.cuda_lists import SPARSE_K, equal, llama_8b, spread
from bench.cuda_timing import READ_GB_PER_S, Peer, Plan, Target, copier, one_read, reader
from bench.harness import time_ratio
from piece_ops.predict import costs
from piece_ops.predict.devices import device

PRODUCTS_FLOP_PER_MS = 530e9  # bfloat16, in Triton: what L2 gives to tiles of 128 x 128
SAMPLED_TOKENS = 8192
H200 = device("h200", torch.bfloat16)
MM = "torch.mm, the batch's gradient, no squares"
GEMM = "dense GEMM, bfloat16"


@dataclass
class Samples:
    """Factors of a Linear's per-sample gradients, bfloat16, and their accumulators."""

    grad: Tensor
    x: Tensor
    offsets: Tensor
    squares: Tensor
    sums: Tensor

    @classmethod
    def of(cls, out: int, features: int, samples: int, length: int) -> Samples:
        tokens = samples * length
        grad, x = (
            torch.randn(tokens, n, device="cuda").to(torch.bfloat16) for n in (out, features)
        )
        squares = torch.zeros(out, features, device="cuda")
        offsets = torch.arange(samples + 1) * length
        return cls(grad, x, offsets, squares, torch.zeros_like(squares))

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = self.offsets.diff().tolist()
        return zip(self.grad.split(sizes), self.x.split(sizes), strict=True)

    def check(self, _: Any) -> str | None:
        """Whether one call on fresh accumulators left their squares."""
        want = sum((g[:, :512].double().T @ x.double()).square() for g, x in self.parts())
        error = float((self.squares[:512].double() - want).abs().max() / want.max())
        return None if error < 1e-4 else f"off by {error:.1e} of the largest"

    def product(self) -> Peer:
        """The batch's ordinary weight gradient, without squares."""
        return Peer(MM, lambda: self.grad.T @ self.x)


def per_sample_squares(out: int, features: int, samples: int, length: int) -> list[Peer]:
    data = Samples.of(out, features, samples, length)
    factors = (data.grad, data.x, data.offsets)

    def loop() -> Any:
        for g, x in data.parts():
            piece_ops.accumulate_squares_(data.squares, g.T @ x)

    def ours() -> Any:
        piece_ops.accumulate_per_sample_squares_(data.squares, *factors)

    def both() -> Any:
        piece_ops.accumulate_per_sample_squares_(data.squares, *factors, data.sums)

    return [
        data.product(),
        Peer("piece_ops", ours, data.check, role="ours"),
        Peer("piece_ops, squares and sums", both, role="ours"),
        Peer("torch.mm a sample, accumulate_squares_", loop),
    ]


def slots(sizes: Sequence[int], k: int, scatters: bool) -> list[Peer]:
    dense = [torch.randn(n, device="cuda").to(torch.bfloat16) for n in sizes]
    indices = spread(sizes, k)
    values = [torch.randn(i.numel(), device="cuda") for i in indices]
    if scatters:

        def check(_: Any) -> str | None:
            got = [d[i] for d, i in zip(dense, indices, strict=True)]
            return equal(got, [x.to(torch.bfloat16) for x in values])

        def torch_way() -> Any:
            for d, i, x in zip(dense, indices, values, strict=True):
                d.index_copy_(0, i, x.to(torch.bfloat16))

        mine = Peer(
            "piece_ops", lambda: piece_ops.scatter_(dense, indices, values), check, role="ours"
        )
        return [copier(76 * k), mine, Peer("torch.index_copy_, one by one", torch_way)]

    def check_gather(got: Any) -> str | None:
        return equal(got, [d[i] for d, i in zip(dense, indices, strict=True)])

    def torch_gather() -> Any:
        return [d[i] for d, i in zip(dense, indices, strict=True)]

    mine = Peer("piece_ops", lambda: piece_ops.gather(dense, indices), check_gather, role="ours")
    return [copier(42 * k), mine, Peer("torch indexing, one by one", torch_gather)]


def total(n: int) -> list[Peer]:
    x = torch.rand(n, device="cuda")
    exact = float(sum(part.double().sum() for part in x.split(1 << 28)))

    def check(got: Any) -> str | None:
        return None if abs(got - exact) <= 1e-9 * exact else f"{got}, want {exact}"

    return [
        reader([x]),
        Peer("piece_ops", lambda: piece_ops.total(x), check, role="ours"),
        Peer("torch.sum, float64", lambda: x.sum(dtype=torch.float64)),
    ]


def sampled(tokens: int, out: int, width: int) -> list[Peer]:
    """0.1 % of one Linear's weight gradient, bfloat16."""
    g, x = (torch.randn(tokens, n, device="cuda").to(torch.bfloat16) for n in (out, width))
    indices = spread([out * width], out * width // 1000)[0]
    some = slice(0, 1000)  # the reference takes a column a product
    i, j = indices[some] // width, indices[some] % width
    want = (g[:, i].double() * x[:, j].double()).sum(0)

    def check(got: Any) -> str | None:
        close = torch.allclose(got[some].double(), want, rtol=1e-3, atol=1e-3)
        return None if close else "other values"

    return [
        copier(2 * tokens * (out + 3 * width)),
        Peer(
            "piece_ops",
            lambda: piece_ops.sampled_weight_grad(g, x, indices),
            check,
            role="ours",
        ),
        Peer(GEMM, lambda: g.t() @ x),
    ]


def plans() -> Iterator[Plan]:
    llama = llama_8b()
    for out, features, samples, length in (
        (4096, 4096, 8, 1024),
        (1024, 4096, 8, 1024),
        (14336, 4096, 8, 1024),
        (4096, 14336, 8, 1024),
        (4096, 4096, 128, 64),
    ):
        tokens = samples * length
        # 1.15 x of a whole backward is 1.3 x of the product that makes the gradient.
        slower = Target("time / torch.mm of the batch", time_ratio("piece_ops", MM), 1.3, True)
        yield Plan(
            "accumulate_per_sample_squares_",
            f"{out} x {features}, {samples} samples of {length} tokens, bfloat16",
            out * features,
            4 * tokens * (out + features) + 8 * out * features,
            [slower],
            partial(per_sample_squares, out, features, samples, length),
            more_ms=2 * tokens * out * features / PRODUCTS_FLOP_PER_MS + 0.03,
        )
    yield Plan(
        "gather",
        f"Llama-8B, k = {SPARSE_K:,}, bfloat16",
        SPARSE_K,
        42 * SPARSE_K,
        [],
        lambda: slots(llama, SPARSE_K, False),
        gb_per_s=READ_GB_PER_S,
    )
    yield Plan(
        "scatter_",
        f"Llama-8B, k = {SPARSE_K:,}, float32 into bfloat16",
        SPARSE_K,
        76 * SPARSE_K,
        [],
        lambda: slots(llama, SPARSE_K, True),
    )
    n = 1_000_000_000
    yield Plan(
        "total",
        f"{n:.0e} float32",
        n,
        4 * n,
        [one_read(1.3)],
        lambda: total(n),
        gb_per_s=READ_GB_PER_S,
        more_ms=0.16,  # the chains of additions at the end
        dtype="float32",
    )
    for out, width in ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096)):
        work = costs.sampled_weight_grad(SAMPLED_TOKENS, out, width, 2, out * width // 1000, H200)
        yield Plan(
            "sampled_weight_grad",
            f"{out} x {width}, {SAMPLED_TOKENS} tokens, 0.1 %, bfloat16",
            out * width // 1000,
            2 * SAMPLED_TOKENS * (out + width),
            [Target("faster than the dense GEMM", time_ratio(GEMM, "piece_ops"), 4.0, False)],
            partial(sampled, SAMPLED_TOKENS, out, width),
            our_bytes=int(work.read),
            more_ms=1e3 * (work.l2 / H200.l2 + work.wait),  # the panel and its rows; launches
        )
