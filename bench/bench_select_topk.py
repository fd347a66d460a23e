"""select_topk: against one read of the scores, and against every usual way to select on the CPU.

Bytes: each score once (4 per float32); what is selected, 0.1 %, adds 0.2 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import piece_ops
from bench.harness import Case, Peer, Target, extra_share, over_floor, time_ratio
from bench.inputs import (
    all_equal,
    ascending,
    count_elements,
    gaussian_squared,
    lognormal,
    smollm2_shapes,
    split_like,
    values_256,
    zeros_99,
)
from piece_ops import _native
from piece_ops.reference import check_topk

OURS, RADIX = "piece_ops", "piece_ops, radix"
TOPK, ARGPARTITION = "torch.topk", "numpy.argpartition"


def floors(tensors: Sequence[Tensor]) -> list[Peer]:
    """Two ways to read the memory once; the faster one is the floor."""
    n_bytes = sum(t.nbytes for t in tensors)

    def read() -> None:
        for t in tensors:
            _native.read_bandwidth_probe(t)

    def add() -> None:
        for t in tensors:
            t.sum()

    return [
        Peer("read loop", read, role="floor", n_bytes=n_bytes),
        Peer("torch.sum", add, role="floor", n_bytes=n_bytes),
    ]


def check_ours(tensors: list[Tensor], k: int) -> Callable[[Any], str | None]:
    """Ours must also take the first of the ties."""
    return lambda top: check_topk(
        tensors, top.indices if isinstance(top.indices, list) else [top.indices], k
    )


def check_set(flat: Tensor, k: int) -> Callable[[Any], str | None]:
    """Others may take any of the ties, in any order; the result is one array of positions."""

    def check(indices: Any) -> str | None:
        ordered = torch.as_tensor(indices).sort().values
        return check_topk([flat], [ordered], k, first_ties=False)

    return check


def torch_topk(flat: Tensor, k: int) -> Tensor:
    return torch.topk(flat, k, sorted=False).indices


def numpy_argpartition(flat: Tensor, k: int) -> Any:
    return np.argpartition(flat.numpy(), flat.numel() - k)[-k:].copy()


def numpy_partition(flat: Tensor, k: int) -> Any:
    """The k-th largest by numpy.partition, then one scan for the positions."""
    x = flat.numpy()
    threshold = np.partition(x, x.size - k)[x.size - k]
    found = np.flatnonzero(x >= threshold)
    if found.size == k:
        return found
    above = np.flatnonzero(x > threshold)
    return np.concatenate([above, np.flatnonzero(x == threshold)[: k - above.size]])


def torch_kthvalue(flat: Tensor, k: int) -> Tensor:
    """The k-th largest by kthvalue, then one comparison for the positions."""
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    found = (flat >= threshold).nonzero().flatten()
    if found.numel() == k:
        return found
    above = (flat > threshold).nonzero().flatten()
    ties = (flat == threshold).nonzero().flatten()
    return torch.cat([above, ties[: k - above.numel()]])


def ours(scores: Any, k: int, algorithm: str = "auto") -> Callable[[], Any]:
    return lambda: piece_ops.select_topk(scores, k, algorithm=algorithm)


def one_array(make: Callable[[int], Tensor], n: int, *, all_peers: bool) -> Case:
    """The main row: one float32 array, k = 0.1 %."""
    x, k = make(n), n // 1000
    right = check_set(x, k)
    peers = [
        *floors([x]),
        Peer(OURS, ours(x, k), check_ours([x], k), "ours"),
        Peer(RADIX, ours(x, k, "radix"), check_ours([x], k), "ours"),
        Peer(TOPK, lambda: torch_topk(x, k), right, note="sorted=False"),
        Peer(ARGPARTITION, lambda: numpy_argpartition(x, k), right),
        Peer("numpy.partition + scan", lambda: numpy_partition(x, k), right),
    ]
    if all_peers:
        peers.append(Peer("torch.kthvalue + compare", lambda: torch_kthvalue(x, k), right))
    faster = 50.0 if n > 2e8 else 10.0
    targets = [
        Target("time / one read of the scores", over_floor(OURS), 1.4, at_most=True),
        Target("faster than torch.topk", time_ratio(TOPK, OURS), faster, at_most=False),
        Target("faster than numpy.argpartition", time_ratio(ARGPARTITION, OURS), 20, at_most=False),
        Target("extra memory / scores", extra_share(OURS, x.nbytes), 5.0, at_most=True, unit="%"),
    ]
    return Case("select_topk", "fp32", n, x.nbytes, peers, targets)


def hostile(make: Callable[[int], Tensor], n: int) -> Case:
    """Inputs that defeat a sample or a comparison sort."""
    x, k = make(n), n // 1000
    peers = [
        *floors([x]),
        Peer(OURS, ours(x, k), check_ours([x], k), "ours"),
        Peer(RADIX, ours(x, k, "radix"), check_ours([x], k), "ours"),
        Peer(TOPK, lambda: torch_topk(x, k), check_set(x, k), note="sorted=False"),
    ]
    targets = [
        Target("time / one read of the scores", over_floor(OURS), 4.0, at_most=True),
    ]
    return Case("select_topk", "fp32", n, x.nbytes, peers, targets)


def piece_s(n: int) -> Case:
    """The score fused into the selection: two accumulators are read, no score is written."""
    g = torch.Generator().manual_seed(1)
    scale = torch.randn(n, generator=g).exp_()
    sums = torch.randn(n, generator=g).mul_(scale)
    squares = torch.rand(n, generator=g).add_(0.5).mul_(scale).mul_(scale)
    del scale
    k, xi = n // 1000, 1.0
    score = piece_ops.Score("piece-s", sums, squares, constant=xi)

    def materialise() -> Tensor:
        # numpy's float32 root is correctly rounded; torch's is not, and the check is exact.
        root = (squares + xi).numpy()
        np.sqrt(root, out=root)
        return sums.abs().div_(torch.from_numpy(root))

    def right(top: Any) -> str | None:
        is_ours = not isinstance(top, Tensor)
        indices = top.indices if is_ours else top.sort().values
        return check_topk([materialise()], [indices], k, first_ties=is_ours)

    peers = [
        *floors([sums, squares]),
        Peer(OURS, ours(score, k), right, "ours", note="fused"),
        Peer(
            "piece_ops, score array first",
            lambda: piece_ops.select_topk(materialise(), k),
            right,
            "ours",
        ),
        Peer("torch: score array, topk", lambda: torch_topk(materialise(), k), right),
    ]
    targets = [Target("time / one read of both", over_floor(OURS), 1.5, at_most=True)]
    return Case("select_topk", "fp32", n, 8 * n, peers, targets)


def many_tensors(shapes: list[tuple[int, ...]]) -> Case:
    """The same numbers as a list of tensors and as one tensor."""
    n = count_elements(shapes)
    flat, k = gaussian_squared(n), n // 1000
    parts = split_like(flat, shapes)
    one = "piece_ops, as one tensor"
    peers = [
        *floors([flat]),
        Peer(OURS, ours(parts, k), check_ours(parts, k), "ours", note=f"{len(parts)} tensors"),
        Peer(one, ours(flat, k), check_ours([flat], k), "ours"),
        Peer(
            "torch.cat + torch.topk",
            lambda: torch_topk(torch.cat([p.flatten() for p in parts]), k),
            check_set(flat, k),
        ),
    ]
    targets = [Target("time / as one tensor", time_ratio(OURS, one), 1.3, at_most=True)]
    return Case("select_topk", "fp32", n, 4 * n, peers, targets)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Builders of the cases; quick: small sizes that show only that everything runs."""
    small, large = (1_000_000, 5_000_000) if quick else (100_000_000, 500_000_000)
    main = (("Gaussian squared", gaussian_squared), ("lognormal, sigma 4", lognormal))
    for n in (small, large):
        for name, make in main:
            # kthvalue takes 10 s at 5e8 and tells nothing new there.
            yield f"{name}, n = {n:.0e}", partial(one_array, make, n, all_peers=n == small)
    for name, make in (
        ("all equal", all_equal),
        ("99 % zeros", zeros_99),
        ("ascending", ascending),
        ("256 distinct values", values_256),
    ):
        yield f"{name}, n = {small:.0e}", partial(hostile, make, small)
    yield f"PIECE-S of 2 x {small:.0e}", partial(piece_s, small)
    yield "272 tensors of SmolLM2-135M", partial(many_tensors, smollm2_shapes())
    count = 1000 if quick else 10_000
    yield f"{count:,} tensors of 10,000", partial(many_tensors, [(10_000,)] * count)
