"""``make bench-cuda``: every op on a GPU beside its peers; DRY=1 lists the rows without one.

Each row names the bytes that the op must move, what that takes on one H200 (4.3 TB/s read, 4.0
TB/s read and write), and what it is held to. With a GPU, peers are timed as
``bench.cuda_timing`` says; ends with 0 unless an answer was wrong or a peer failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench import cuda_select_topk
from bench.cuda_timing import READ_GB_PER_S, Peer, Row, copier, graphed, optional, run_rows
from piece_ops.backends.cuda_adamw_plan import SparseAdamwPlan

SPARSE_K = 8_000_000
PRODUCTS_FLOP_PER_MS = 600e9  # bfloat16, in Triton
SAMPLED_TOKENS = 8192


def llama_8b() -> list[int]:
    """Sizes of the 291 tensors of Llama-3-8B."""
    layer = [4096 * 4096] * 2 + [1024 * 4096] * 2 + [14336 * 4096] * 3 + [4096] * 2
    return [128256 * 4096, *layer * 32, 4096, 128256 * 4096]


def equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    pairs = zip(got, want, strict=True)
    bad = [t for t, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
    return f"{len(bad)} tensors differ" if bad else None


# ---- peers ------------------------------------------------------------------------------------


def accumulate(sizes: Sequence[int], has_sums: bool) -> list[Peer]:
    grads = [torch.randn(n, device="cuda").to(torch.bfloat16) for n in sizes]
    squares = [torch.zeros(n, device="cuda") for n in sizes]
    sums = [torch.zeros(n, device="cuda") for n in sizes] if has_sums else None
    n_bytes = sum(sizes) * (20 if has_sums else 12)

    def ours() -> Any:
        piece_ops.accumulate_squares_(squares, grads, sums=sums)

    def check(_: Any) -> str | None:
        wide = (g.float() for g in grads)  # after the first call
        return equal(squares, [g * g for g in wide]) if sum(sizes) < 2**31 else None

    def foreach() -> Any:
        torch._foreach_addcmul_(squares, grads, grads)

    peers = [copier(n_bytes), Peer("piece_ops", ours, check)]
    if len(sizes) > 1000:  # where the host's time for a call exceeds the device's
        peers.append(graphed("piece_ops, replayed from a CUDA graph", ours))
    if not has_sums:
        peers.append(Peer("torch._foreach_addcmul_ (no look for NaN)", foreach))
    return peers


def per_sample_squares(out: int, features: int, samples: int, length: int) -> list[Peer]:
    """bfloat16; the first peer is the batch's ordinary weight gradient, without squares."""
    tokens = samples * length
    grad = torch.randn(tokens, out, device="cuda").to(torch.bfloat16)
    x = torch.randn(tokens, features, device="cuda").to(torch.bfloat16)
    offsets = torch.arange(samples + 1) * length
    squares = torch.zeros(out, features, device="cuda")
    sums = torch.zeros_like(squares)
    parts = list(zip(grad.split(length), x.split(length), strict=True))

    def check(_: Any) -> str | None:
        want = sum((g[:, :512].double().T @ y.double()).square() for g, y in parts)
        error = float((squares[:512].double() - want).abs().max() / want.max())
        return None if error < 1e-4 else f"off by {error:.1e} of the largest"

    def loop() -> Any:
        for g, y in parts:
            piece_ops.accumulate_squares_(squares, g.T @ y)

    def ours() -> Any:
        piece_ops.accumulate_per_sample_squares_(squares, grad, x, offsets)

    def both() -> Any:
        piece_ops.accumulate_per_sample_squares_(squares, grad, x, offsets, sums)

    return [
        Peer("torch.mm, the batch's gradient, no squares", lambda: grad.T @ x),
        Peer("piece_ops", ours, check),
        Peer("piece_ops, squares and sums", both),
        Peer("torch.mm a sample, accumulate_squares_", loop),
    ]


def spread(sizes: Sequence[int], k: int) -> list[Tensor]:
    """Positions in every tensor in proportion to its size, about k in all."""
    share = k / sum(sizes)
    found = []
    for n in sizes:
        own = max(1, int(n * share))
        step = n // own
        jitter = torch.randint(step, (own,), device="cuda") if step > 1 else 0
        found.append(torch.arange(own, device="cuda") * step + jitter)
    return found


def adamw(sizes: Sequence[int], k: int) -> list[Peer]:
    weights = [torch.zeros(n, dtype=torch.bfloat16, device="cuda") for n in sizes]
    indices = spread(sizes, k)
    values, m, v = ([torch.zeros(i.numel(), device="cuda") for i in indices] for _ in range(3))
    grads = [torch.randn(i.numel(), device="cuda") for i in indices]
    plan = SparseAdamwPlan(weights, indices, values, grads, m, v)

    def check(_: Any) -> str | None:
        pairs = zip(weights, indices, values, strict=True)
        return equal([w[i] for w, i, _ in pairs], [x.to(torch.bfloat16) for x in values])

    def lists() -> Any:
        piece_ops.sparse_adamw_(weights, indices, values, grads, m, v, step=1, lr=1e-4)

    def dense() -> Peer:
        parameters = [torch.nn.Parameter(torch.zeros_like(w)) for w in weights]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        return Peer("torch.optim.AdamW, fused, dense, all bfloat16", optimizer.step)

    peers = [
        copier(100 * k),
        Peer("piece_ops, kept plan", lambda: plan.step(1, 1e-4), check),
        Peer("piece_ops, lists", lists),
    ]
    return [*peers, optional(dense, "torch.optim.AdamW")]


def host_time(sizes: Sequence[int], k: int) -> list[Peer]:
    """The kept plan's time on the host: what a launch costs while the GPU is busy."""
    weights = [torch.zeros(n, dtype=torch.bfloat16, device="cuda") for n in sizes]
    indices = spread(sizes, k)
    values, grads, m, v = ([torch.zeros(i.numel(), device="cuda") for i in indices] for _ in "vgmv")
    plan = SparseAdamwPlan(weights, indices, values, grads, m, v)

    def run(_kept: Any = grads) -> Any:
        plan.step(1, 1e-4)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            plan.step(1, 1e-4)
        microseconds = (time.perf_counter() - start) * 1e4
        torch.cuda.synchronize()
        return {"host_us_a_step": round(microseconds, 1)}

    return [Peer("100 steps of a kept plan and the wait for them", run)]


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

        mine = Peer("piece_ops", lambda: piece_ops.scatter_(dense, indices, values), check)
        return [copier(76 * k), mine, Peer("torch.index_copy_, one by one", torch_way)]

    def check_gather(got: Any) -> str | None:
        return equal(got, [d[i] for d, i in zip(dense, indices, strict=True)])

    def torch_gather() -> Any:
        return [d[i] for d, i in zip(dense, indices, strict=True)]

    mine = Peer("piece_ops", lambda: piece_ops.gather(dense, indices), check_gather)
    return [copier(42 * k), mine, Peer("torch indexing, one by one", torch_gather)]


def total(n: int) -> list[Peer]:
    x = torch.rand(n, device="cuda")
    exact = float(sum(part.double().sum() for part in x.split(1 << 28)))

    def check(got: Any) -> str | None:
        return None if abs(got - exact) <= 1e-9 * exact else f"{got}, want {exact}"

    return [
        Peer("one read (torch.amax)", lambda: x.amax()),
        Peer("piece_ops", lambda: piece_ops.total(x), check),
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
        Peer("piece_ops", lambda: piece_ops.sampled_weight_grad(g, x, indices), check),
        Peer("dense GEMM, bfloat16", lambda: g.t() @ x),
    ]


# ---- rows -------------------------------------------------------------------------------------


def rows() -> Iterator[Row]:
    n, llama = 1_000_000_000, llama_8b()
    copy = ">= 90 % of the copy bandwidth of the same run"
    yield Row(
        "accumulate_squares_",
        "1e9 bfloat16, squares",
        12 * n,
        copy,
        lambda: accumulate([n], False),
    )
    yield Row(
        "accumulate_squares_",
        "1e9 bfloat16, squares and sums",
        20 * n,
        copy,
        lambda: accumulate([n], True),
    )
    yield Row(
        "accumulate_squares_",
        f"Llama-8B, {len(llama)} tensors, {sum(llama) / 1e9:.2f}e9 bfloat16, squares",
        12 * sum(llama),
        copy,
        lambda: accumulate(llama, False),
    )
    yield Row(
        "accumulate_squares_",
        "10,000 tensors of 100,000 bfloat16, squares",
        12 * n,
        "<= 1.3 x the time of one tensor of 1e9",
        lambda: accumulate([100_000] * 10_000, False),
        more_ms=15.0,  # of host: some 1.5 us of Python a tensor, none in a replay
    )
    for out, features, samples, length in (
        (4096, 4096, 8, 1024),
        (1024, 4096, 8, 1024),
        (14336, 4096, 8, 1024),
        (4096, 14336, 8, 1024),
        (4096, 4096, 128, 64),
    ):
        tokens = samples * length
        yield Row(
            "accumulate_per_sample_squares_",
            f"{out} x {features}, {samples} samples of {length} tokens, bfloat16",
            4 * tokens * (out + features) + 8 * out * features,
            "<= 1.3 x torch.mm of the batch (1.15 x of a backward)",
            partial(per_sample_squares, out, features, samples, length),
            more_ms=2 * tokens * out * features / PRODUCTS_FLOP_PER_MS + 0.03,
        )
    yield Row(
        "sparse_adamw_",
        f"Llama-8B, k = {SPARSE_K:,}, compact float32 gradients",
        100 * SPARSE_K,
        "<= 1/50 of fused dense AdamW",
        lambda: adamw(llama, SPARSE_K),
    )
    yield Row(
        "sparse_adamw_",
        "host time, Llama-8B",
        100 * SPARSE_K * 100,
        "< 20 us a step on the host",
        lambda: host_time(llama, SPARSE_K),
    )
    yield Row(
        "gather",
        f"Llama-8B, k = {SPARSE_K:,}, bfloat16",
        42 * SPARSE_K,
        "one launch",
        lambda: slots(llama, SPARSE_K, False),
        gb_per_s=READ_GB_PER_S,
    )
    yield Row(
        "scatter_",
        f"Llama-8B, k = {SPARSE_K:,}, float32 into bfloat16",
        76 * SPARSE_K,
        "one launch",
        lambda: slots(llama, SPARSE_K, True),
    )
    yield Row(
        "total",
        "1e9 float32",
        4 * n,
        "<= 1.3 x one read",
        lambda: total(n),
        gb_per_s=READ_GB_PER_S,
        more_ms=0.16,  # the chains of additions at the end
    )
    for out, width in ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096)):
        products = SAMPLED_TOKENS * (out * width // 1000)
        yield Row(
            "sampled_weight_grad",
            f"{out} x {width}, {SAMPLED_TOKENS} tokens, 0.1 %, bfloat16",
            2 * SAMPLED_TOKENS * (out + 3 * width),  # input is read, written and read transposed
            ">= 4 x faster than the dense GEMM",
            partial(sampled, SAMPLED_TOKENS, out, width),
            more_ms=0.01 + 2 * products / 5.5e9,  # the panel's rows from L2
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="list the rows; needs no GPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose line contains this text")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        print(
            "bench.cuda: wanted a CUDA device, got none; --dry (make bench-cuda DRY=1) lists rows"
        )
        return 2
    chosen = [row for row in (*rows(), *cuda_select_topk.rows()) if args.only in str(row)]
    return run_rows(chosen, is_dry=args.dry, repeats=args.repeats, out=args.out)


if __name__ == "__main__":
    sys.exit(main())
