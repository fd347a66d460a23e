"""``make bench-cuda``: every op on a GPU beside its peers; DRY=1 lists the rows without one.

Each row names the bytes that the op must move, what that takes on one H200 (4.3 TB/s read, 4.0
TB/s read and write), and what it is held to. With a GPU, peers are timed as in
``bench.cuda_select_topk``; the first peer of a row is a plain read or copy of the same number of
bytes in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench import cuda_select_topk
from bench.cuda_select_topk import Peer, run_row
from piece_ops.backends.cuda_adamw_plan import SparseAdamwPlan

READ_GB_PER_S = cuda_select_topk.READ_GB_PER_S
COPY_GB_PER_S = 4000.0
LAUNCH_MS = 0.01
SPARSE_K = 8_000_000


@dataclass
class Row:
    """Like bench.cuda_select_topk.Row, for any op; ``floor_bytes`` are read and written."""

    op: str
    name: str
    floor_bytes: int
    target: str
    build: Callable[[], list[Peer]]
    gb_per_s: float = COPY_GB_PER_S
    more_ms: float = LAUNCH_MS

    @property
    def floor_ms(self) -> float:
        return self.floor_bytes / self.gb_per_s / 1e6

    @property
    def predicted_ms(self) -> float:
        return self.floor_ms + self.more_ms


def llama_8b() -> list[int]:
    """Sizes of the 291 tensors of Llama-3-8B."""
    layer = [4096 * 4096] * 2 + [1024 * 4096] * 2 + [14336 * 4096] * 3 + [4096] * 2
    return [128256 * 4096, *layer * 32, 4096, 128256 * 4096]


def copier(n_bytes: int) -> Peer:
    """Reads and writes n_bytes together, through buffers of at most 8 GB."""
    times = max(1, -(-n_bytes // 8_000_000_000))
    source = torch.empty(n_bytes // times // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def run() -> Any:
        for _ in range(times):
            target.copy_(source)

    return Peer("copy of as many bytes", run)


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
    if not has_sums:
        peers.append(Peer("torch._foreach_addcmul_ (no look for NaN)", foreach))
    return peers


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
    return [*peers, cuda_select_topk.optional(dense, "torch.optim.AdamW")]


def host_time(sizes: Sequence[int], k: int) -> list[Peer]:
    """The kept plan's time on the host: what a launch costs while the GPU is busy."""
    weights = [torch.zeros(n, dtype=torch.bfloat16, device="cuda") for n in sizes]
    indices = spread(sizes, k)
    lists = [[torch.zeros(i.numel(), device="cuda") for i in indices] for _ in range(4)]
    plan = SparseAdamwPlan(weights, indices, *lists)

    def run() -> Any:
        plan.step(1, 1e-4)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            plan.step(1, 1e-4)
        microseconds = (time.perf_counter() - start) * 1e4
        torch.cuda.synchronize()
        return microseconds

    print(f"   host time of a kept plan's step: {run():.1f} us (target < 20)")
    return [Peer("100 steps and the wait for them", run)]


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
        READ_GB_PER_S,
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
        READ_GB_PER_S,
        0.16,  # the chains of additions at the end
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="list the rows; needs no GPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose op or name contains this text")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        print(
            "bench.cuda: wanted a CUDA device, got none; --dry (make bench-cuda DRY=1) lists rows"
        )
        return 2
    for row in rows():
        if args.only not in f"{row.op} {row.name}":
            continue
        print(
            f"{row.op}: {row.name}: {row.floor_bytes / 1e9:.2f} GB, floor {row.floor_ms:.2f} ms, "
            f"predicted {row.predicted_ms:.2f} ms; {row.target}"
        )
        if args.dry:
            continue
        for line in run_row(row, args.repeats):  # type: ignore[arg-type]
            line["op"] = row.op
            print("  ", {k: v for k, v in line.items() if k not in ("op", "case", "device")})
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps(line) + "\n")
        torch.cuda.empty_cache()
    passed_on = ["--repeats", str(args.repeats), "--only", args.only]
    passed_on += ["--dry"] if args.dry else []
    passed_on += ["--out", str(args.out)] if args.out else []
    return cuda_select_topk.main(passed_on)


if __name__ == "__main__":
    sys.exit(main())
