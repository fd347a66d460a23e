"""Accumulation and update over lists of tensors on a GPU: plans and their peers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.cuda_timing import (
    HostPeer,
    Peer,
    Plan,
    Rows,
    Target,
    copier,
    copy_share,
    count_launches,
    graphed,
    no_slower,
    optional,
)
from bench.harness import time_ratio
from piece_ops.backends.cuda_adamw_plan import SparseAdamwPlan

SPARSE_K = 8_000_000
SLOT_BYTES = 100  # of a selected weight: sectors of 32 bytes of the weight, read and written
DENSE = "torch.optim.AdamW, fused, dense, all bfloat16"
STEPS = 100  # of a kept plan in one measurement of the host's time


def llama_8b() -> list[int]:
    """Sizes of the 291 tensors of Llama-3-8B."""
    layer = [4096 * 4096] * 2 + [1024 * 4096] * 2 + [14336 * 4096] * 3 + [4096] * 2
    return [128256 * 4096, *layer * 32, 4096, 128256 * 4096]


def equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    pairs = zip(got, want, strict=True)
    bad = [t for t, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
    return f"{len(bad)} tensors differ" if bad else None


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


# ---- accumulate_squares_ ----------------------------------------------------------------------


def accumulate(sizes: Sequence[int], has_sums: bool, floor_bytes: int) -> list[Peer]:
    grads = [torch.randn(n, device="cuda").to(torch.bfloat16) for n in sizes]
    squares = [torch.zeros(n, device="cuda") for n in sizes]
    sums = [torch.zeros(n, device="cuda") for n in sizes] if has_sums else None

    def ours() -> Any:
        piece_ops.accumulate_squares_(squares, grads, sums=sums)

    def check(_: Any) -> str | None:
        wide = (g.float() for g in grads)  # after the first call
        return equal(squares, [g * g for g in wide]) if sum(sizes) < 2**31 else None

    def foreach() -> Any:
        torch._foreach_addcmul_(squares, grads, grads)

    peers = [copier(floor_bytes), Peer("piece_ops", ours, check, role="ours")]
    if not has_sums:
        peers.append(Peer("torch._foreach_addcmul_ (no look for NaN)", foreach))
    return peers


def accumulate_parts(n: int, counts: Sequence[int]) -> list[Peer]:
    """The same n elements, as few and as many tensors."""
    grad = torch.randn(n, device="cuda").to(torch.bfloat16)
    square = torch.zeros(n, device="cuda")
    peers = [copier(10 * n)]
    for count in counts:
        parts = [list(x.split(n // count)) for x in (square, grad)]

        def ours(parts: Any = parts) -> Any:
            piece_ops.accumulate_squares_(*parts)

        peers.append(Peer(f"{count:,} tensors", ours, role="ours"))
        peers.append(graphed(f"{count:,} tensors, replayed from a CUDA graph", ours))
    wide = grad.float()

    def check(_: Any) -> str | None:
        return equal([square], [wide * wide])

    peers[1].check = check
    return peers


def _accumulate_plan(name: str, sizes: Sequence[int], has_sums: bool) -> Plan:
    n = sum(sizes)
    must, moved = n * (18 if has_sums else 10), n * (20 if has_sums else 12)
    return Plan(
        "accumulate_squares_",
        name,
        n,
        must,
        [
            copy_share("of the copy's bandwidth, by the bytes that must move", must),
            copy_share("of the copy's bandwidth, by the bytes moved (second look)", moved),
        ],
        lambda: accumulate(sizes, has_sums, must),
        our_bytes=moved,
    )


# ---- sparse_adamw_ ----------------------------------------------------------------------------


def lists(weights: list[Tensor], k: int) -> list[list[Tensor]]:
    """Weights, indices, values, gradients and moments, as sparse_adamw_ takes them."""
    indices = spread([w.numel() for w in weights], k)
    values, m, v = ([torch.zeros(i.numel(), device="cuda") for i in indices] for _ in range(3))
    grads = [torch.randn(i.numel(), device="cuda") for i in indices]
    return [weights, indices, values, grads, m, v]


def adamw(sizes: Sequence[int], k: int, launches: list[float]) -> list[Peer]:
    """``launches`` gets how many launches a step has, where that can be told."""
    weights = [torch.zeros(n, dtype=torch.bfloat16, device="cuda") for n in sizes]
    given = lists(weights, k)
    _, indices, values, *_ = given
    plan = SparseAdamwPlan(*given)

    def check(_: Any) -> str | None:
        pairs = zip(weights, indices, values, strict=True)
        return equal([w[i] for w, i, _ in pairs], [x.to(torch.bfloat16) for x in values])

    def count() -> None:
        found = count_launches(lambda: plan.step(1, 1e-4))
        launches.extend([] if found is None else [found])

    def dense() -> Peer:
        parameters = [torch.nn.Parameter(torch.zeros_like(w)) for w in weights]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        return Peer(DENSE, optimizer.step)

    step = Peer("piece_ops, kept plan", lambda: plan.step(1, 1e-4), check, role="ours")
    step.prepare = count
    return [
        copier(SLOT_BYTES * k),
        step,
        Peer(
            "piece_ops, lists",
            lambda: piece_ops.sparse_adamw_(*given, step=1, lr=1e-4),
            role="ours",
        ),
        optional(dense, DENSE),
    ]


def host_time(sizes: Sequence[int], k: int) -> list[Peer]:
    """What a step costs the host while the GPU is busy."""
    given = lists([torch.zeros(n, dtype=torch.bfloat16, device="cuda") for n in sizes], k)
    plan = SparseAdamwPlan(*given)

    def run(_kept: Any = given) -> float:
        plan.step(1, 1e-4)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            plan.step(1, 1e-4)
        milliseconds = (time.perf_counter() - start) * 1e3 / STEPS
        torch.cuda.synchronize()
        return milliseconds

    return [HostPeer("piece_ops, kept plan, a step on the host", run, role="ours")]


def adamw_parts(n: int, k: int, counts: Sequence[int]) -> list[Peer]:
    """The same n weights and about k indices, as few and as many tensors."""
    flat = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    peers = [copier(SLOT_BYTES * k)]
    for count in counts:
        plan = SparseAdamwPlan(*lists(list(flat.split(n // count)), k))
        peers.append(Peer(f"{count:,} tensors", lambda plan=plan: plan.step(1, 1e-4), role="ours"))
    return peers


def _host_us(rows: Rows) -> float | None:
    row = rows.get("piece_ops, kept plan, a step on the host")
    return 1e3 * row.p50_ms if row and row.times_ms else None


def plans(n: int = 1_000_000_000, sizes: Sequence[int] | None = None) -> Iterator[Plan]:
    """Sizes as arguments, so that a test can build everything small."""
    llama = llama_8b() if sizes is None else sizes
    k = min(SPARSE_K, sum(llama) // 1000)
    counts = (10, 10_000)
    few, many = (f"{count:,} tensors" for count in counts)
    yield _accumulate_plan(f"{n:.0e} bfloat16, squares", [n], False)
    yield _accumulate_plan(f"{n:.0e} bfloat16, squares and sums", [n], True)
    yield _accumulate_plan(
        f"Llama-8B, {len(llama)} tensors, {sum(llama) / 1e9:.2f}e9 bfloat16, squares", llama, False
    )
    yield Plan(
        "accumulate_squares_",
        f"10,000 tensors of {n // 10_000:,} bfloat16, squares",
        n,
        10 * n,
        [
            no_slower(many, few, "time / as ten tensors, whole call"),
            no_slower(
                f"{many}, replayed from a CUDA graph",
                f"{few}, replayed from a CUDA graph",
                "time / as ten tensors, on the device",
            ),
        ],
        lambda: accumulate_parts(n, counts),
        our_bytes=12 * n,
        more_ms=2.0,  # of host: some 0.2 us a tensor, none in a replay
    )
    launches: list[float] = []
    yield Plan(
        "sparse_adamw_",
        f"Llama-8B, k = {k:,}, compact float32 gradients",
        k,
        SLOT_BYTES * k,
        [
            Target(
                "faster than fused dense AdamW",
                time_ratio(DENSE, "piece_ops, kept plan"),
                50.0,
                at_most=False,
            ),
            Target(
                "launches a step",
                lambda _: launches[0] if launches else None,
                1.0,
                at_most=True,
                unit="",
            ),
        ],
        lambda: adamw(llama, k, launches),
    )
    yield Plan(
        "sparse_adamw_",
        f"host time of a step, Llama-8B, k = {k:,}",
        k,
        0,
        [Target("host time a step", _host_us, 20.0, at_most=True, unit="us")],
        lambda: host_time(llama, k),
    )
    yield Plan(
        "sparse_adamw_",
        f"10,000 tensors of {n // 10_000:,}, k = 0.1 %",
        n // 1000,
        SLOT_BYTES * (n // 1000),
        [no_slower(many, few, "time / as ten tensors")],
        lambda: adamw_parts(n, n // 1000, counts),
    )
