"""select_topk: against one read of the scores, and against every usual way to select on the CPU.

Bytes: each score once (4 per float32); what is selected, 0.1 %, adds 0.2 %. A peer that needs more
memory than is free is a row that says so, as torch.topk at 1e9 with its 16 GB.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import piece_ops
from bench.harness import (
    Absent,
    Case,
    Peer,
    Target,
    extra_share,
    over_floor,
    require_memory,
    time_ratio,
)
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
from bench.smollm2 import load, token_ids
from piece_ops import _native
from piece_ops.reference import check_topk

OURS, RADIX = "piece_ops", "piece_ops, radix"
TOPK, ARGPARTITION, PARTITION = "torch.topk", "numpy.argpartition", "numpy.partition + scan"
SMALL, LARGE, HUGE = 100_000_000, 500_000_000, 1_000_000_000


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


class Check:
    """Says what is wrong with a selection. An answer proven once need not be proven again."""

    def __init__(self, tensors: Sequence[Tensor], k: int) -> None:
        self.tensors, self.k = tensors, k
        self.proven: list[Tensor] | None = None  # with the first of the ties

    def ours(self, top: Any) -> str | None:
        """Ours must also take the first of the ties."""
        indices = top.indices if isinstance(top.indices, list) else [top.indices]
        wrong = self._wrong(indices, first_ties=True)
        if wrong is None:
            self.proven = indices
        return wrong

    def others(self, indices: Any) -> str | None:
        """Others may take any of the ties, in any order; the result is one array of positions."""
        return self._wrong([torch.as_tensor(indices).sort().values], first_ties=False)

    def _wrong(self, indices: list[Tensor], first_ties: bool) -> str | None:
        if self.proven is not None and len(indices) == len(self.proven):
            if all(map(torch.equal, indices, self.proven)):
                return None
        return check_topk(self.tensors, indices, self.k, first_ties=first_ties)


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


SECONDS = 0.7  # of the timed calls of one peer


class Peers:
    """The other ways to take k of one array, each with what it needs to be made or refused."""

    def __init__(self, flat: Tensor, k: int) -> None:
        self.flat, self.k = flat, k
        self.check = Check([flat], k)
        self.right = self.check.others

    def topk(self) -> Peer:
        def run() -> Tensor:
            # Pairs of value and position, 16 bytes a score.
            require_memory(16 * self.flat.numel())
            return torch_topk(self.flat, self.k)

        return Peer(TOPK, run, self.right, note="sorted=False")

    def argpartition(self) -> Peer:
        def run() -> Any:
            require_memory(8 * self.flat.numel())
            return numpy_argpartition(self.flat, self.k)

        return Peer(ARGPARTITION, run, self.right)

    def partition(self) -> Peer:
        return Peer(PARTITION, lambda: numpy_partition(self.flat, self.k), self.right)

    def kthvalue(self) -> Peer:
        run = partial(torch_kthvalue, self.flat, self.k)
        return Peer("torch.kthvalue + compare", run, self.right)

    def nth_element(self) -> Peer:
        run = partial(std_nth_element, self.flat, self.k)
        return Peer("std::nth_element + scan", run, self.right, prepare=nth_element_library)


@lru_cache(maxsize=1)
def nth_element_library() -> Any:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Absent("no C++ compiler")
    source = Path(__file__).with_name("peers_nth_element.cpp")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "nth_element.so"
        command = [*compiler.split(), "-O3", "-march=native", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, "-o", str(made), str(source)], capture_output=True, text=True
        )
        if done.returncode:
            raise Absent((done.stderr.strip().splitlines() or [compiler + " failed"])[0])
        return ctypes.CDLL(str(made))


def std_nth_element(flat: Tensor, k: int) -> Tensor:
    found = torch.empty(k, dtype=torch.int64)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    nth_element_library().nth_element_topk(
        pointer(flat.data_ptr()), number(flat.numel()), number(k), pointer(found.data_ptr())
    )
    return found


def all_ways(x: Tensor, k: int, *more: Callable[[Peers], Peer]) -> list[Peer]:
    """Reads, ours, torch's own, mostly the fastest of the others, and more."""
    peers = Peers(x, k)
    return [
        *floors([x]),
        Peer(OURS, ours(x, k), peers.check.ours, "ours"),
        Peer(RADIX, ours(x, k, "radix"), peers.check.ours, "ours"),
        *(way(peers) for way in (Peers.topk, Peers.partition, *more)),
    ]


def case(n: int, k: int, peers: list[Peer], targets: list[Target]) -> Case:
    return Case("select_topk", "fp32", n, 4 * n, peers, targets, k=k, peer_seconds=SECONDS)


def main_row(make: Callable[[int], Tensor], n: int) -> Case:
    """One float32 array, k = 0.1 %, all peers that end in a few seconds."""
    x, k = make(n), n // 1000
    more = [Peers.argpartition] if n < HUGE else []  # 20 s there
    more += [Peers.kthvalue, Peers.nth_element] if n < LARGE else []  # up to 10 s there
    peers = all_ways(x, k, *more)
    targets = [Target("extra memory / scores", extra_share(OURS, x.nbytes), 5.0, True, unit="%")]
    if SMALL <= n < HUGE:
        by = time_ratio(ARGPARTITION, OURS)
        targets.insert(0, Target("faster than numpy.argpartition", by, 20, at_most=False))
    if n >= 1e8:  # below, the scores stay in the cache
        faster = 50.0 if n > 2e8 else 10.0
        targets = [
            Target("time / one read of the scores", over_floor(OURS), 1.4, at_most=True),
            Target("faster than torch.topk", time_ratio(TOPK, OURS), faster, at_most=False),
            *targets,
        ]
    return case(n, k, peers, targets)


def other_density(n: int, density: float) -> Case:
    x, k = gaussian_squared(n), int(n * density)
    return case(n, k, all_ways(x, k), [])


def hostile(make: Callable[[int], Tensor], n: int) -> Case:
    """Inputs that defeat a sample or a comparison sort; n: at most, as real ones have theirs."""
    x = make(n)
    k = x.numel() // 1000
    targets = [Target("time / one read of the scores", over_floor(OURS), 4.0, at_most=True)]
    return case(x.numel(), k, all_ways(x, k), targets)


def fisher(n: int) -> Tensor:
    """Square sums of SmolLM2-135M's gradients on real text: 16 samples of 32 tokens."""
    quick = n < SMALL
    ids = token_ids(quick, 16, 32)
    importance = piece_ops.Importance(load(quick, torch.float32).eval(), "piece-f")
    importance.update({"input_ids": ids, "labels": ids})
    return torch.cat([squares.view(-1) for squares in importance._square_sums.values()])


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

    check = Check([materialise()], k)
    peers = [
        *floors([sums, squares]),
        Peer(OURS, ours(score, k), check.ours, "ours", note="fused"),
        Peer(
            "piece_ops, score array first",
            lambda: piece_ops.select_topk(materialise(), k),
            check.ours,
            "ours",
        ),
        Peer("torch: score array, topk", lambda: torch_topk(materialise(), k), check.others),
    ]
    targets = [Target("time / one read of both", over_floor(OURS), 1.5, at_most=True)]
    return Case("select_topk", "fp32", n, 8 * n, peers, targets, k=k, peer_seconds=SECONDS)


def many_tensors(shapes: list[tuple[int, ...]]) -> Case:
    """The same numbers as a list of tensors and as one tensor."""
    n = count_elements(shapes)
    flat, k = gaussian_squared(n), n // 1000
    parts = split_like(flat, shapes)
    one, check = "piece_ops, as one tensor", Check([flat], k)
    note = f"{len(parts)} tensors"
    peers = [
        *floors([flat]),
        Peer(OURS, ours(parts, k), Check(parts, k).ours, "ours", note=note),
        Peer(one, ours(flat, k), check.ours, "ours"),
        Peer(
            "torch.cat + torch.topk",
            lambda: torch_topk(torch.cat([p.flatten() for p in parts]), k),
            check.others,
        ),
    ]
    targets = [Target("time / as one tensor", time_ratio(OURS, one), 1.3, at_most=True)]
    return Case(
        "select_topk",
        "fp32",
        n,
        4 * n,
        peers,
        targets,
        k=k,
        tensors=len(parts),
        peer_seconds=SECONDS,
    )


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Builders of the cases; quick: small sizes that show only that everything runs."""
    sizes = (10_000, 1_000_000) if quick else (1_000_000, SMALL, LARGE, HUGE)
    small = sizes[1]
    for n in sizes:
        yield f"Gaussian squared, n = {n:.0e}", partial(main_row, gaussian_squared, n)
    yield f"lognormal, sigma 4, n = {small:.0e}", partial(main_row, lognormal, small)
    for density in (1e-4, 1e-2, 1e-1):
        name = f"Gaussian squared, n = {small:.0e}, {100 * density:g} % selected"
        yield name, partial(other_density, small, density)
    for name, make in (
        ("all equal", all_equal),
        ("99 % zeros", zeros_99),
        ("ascending", ascending),
        ("256 distinct values", values_256),
    ):
        yield f"{name}, n = {small:.0e}", partial(hostile, make, small)
    yield "Fisher values of SmolLM2-135M, real text", partial(hostile, fisher, small)
    yield f"PIECE-S of 2 x {small:.0e}", partial(piece_s, small)
    yield "272 tensors of SmolLM2-135M", partial(many_tensors, smollm2_shapes())
    count = 1000 if quick else 10_000
    yield f"{count:,} tensors of 10,000", partial(many_tensors, [(10_000,)] * count)
