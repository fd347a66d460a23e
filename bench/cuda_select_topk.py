"""select_topk on a GPU: plans with their bytes, floors and predictions, beside their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench import cuda_cub
from bench.cuda_timing import (
    READ_GB_PER_S,
    Peer,
    Plan,
    Rows,
    Target,
    absent,
    no_slower,
    one_read,
    optional,
    reader,
)
from bench.harness import under_best
from piece_ops.backends import cuda
from piece_ops.backends.cuda_select_topk import Arguments, select

LAUNCHES_MS = 0.13  # ten small kernels beside the one read (csrc/cuda/select_topk.cu)
PART = 1 << 30  # scores that torch.topk gets at a time, in its other form
TOPK, TOPK_PARTS, SORT = "torch.topk", "torch.topk of parts, then of their winners", "torch.sort"
MAXIMA = "piece_ops, by the maxima"
WITHOUT, WITH = "accumulation", "accumulation with maxima"
TOGETHER = "accumulation with maxima, then the selection"


# ---- answers ----------------------------------------------------------------------------------


def check_flat(x: Tensor, k: int, *, first_ties: bool) -> Callable[[Tensor], str | None]:
    """Are these positions of one array the k largest (and of the ties the first)?"""

    def check(positions: Tensor) -> str | None:
        found = positions.sort().values if not first_ties else positions
        if found.numel() != k or bool((found[1:] <= found[:-1]).any()):
            return f"{found.numel()} positions, or repeated ones"
        threshold = x[found].min()
        above = int((x > threshold).sum())
        if above >= k or int((x[found] > threshold).sum()) != above:
            return f"not the largest: {above} exceed the smallest one chosen"
        if first_ties:
            chosen = found[x[found] == threshold]
            upto = int((x[: int(chosen[-1]) + 1] == threshold).sum())
            if upto != chosen.numel():
                return "not the first of the ties"
        return None

    return check


def joined(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.numel())
    return torch.cat([i + start for i, start in zip(indices, starts, strict=False)])


# ---- inputs -----------------------------------------------------------------------------------


def random_scores(kind: str, n: int) -> Tensor:
    """Made on the GPU, in place, in pieces where the generator needs it."""
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(n, device="cuda")
    for part in x.split(1 << 28):
        if kind == "Gaussian squared":
            part.normal_(generator=g).square_()
        elif kind == "lognormal, sigma 4":
            part.normal_(generator=g).mul_(4.0).exp_()
        elif kind == "Fisher-like":
            _fisher(part, g)
        elif kind == "all equal":
            part.fill_(0.25)
        elif kind == "99 % zeros":
            part.uniform_(generator=g).sub_(0.99).clamp_(min=0.0)
        else:
            part.uniform_(generator=g).mul_(256).floor_()
    return x


def _fisher(part: Tensor, g: Any) -> None:
    """Squared gradients as matrices have them: outer products, row by column.

    Rows and columns of very different size (lognormal, sigma 2 and 1), squared noise on each entry,
    and one row in eight never touched (an embedding's unseen tokens): exactly zero.
    """
    width = min(4096, part.numel())
    matrix = part[: part.numel() // width * width].view(-1, width)
    part.normal_(generator=g).square_()
    rows = torch.empty(matrix.shape[0], 1, device=part.device).normal_(generator=g).mul_(2).exp_()
    rows[::8] = 0.0
    matrix.mul_(rows).mul_(torch.empty(width, device=part.device).normal_(generator=g).exp_())


# ---- peers ------------------------------------------------------------------------------------


def ours(x: Tensor, k: int, algorithm: str = "auto") -> Peer:
    name = "piece_ops" if algorithm == "auto" else f"piece_ops, {algorithm}"
    return Peer(
        name,
        lambda: piece_ops.select_topk(x, k, algorithm=algorithm).indices,
        check_flat(x, k, first_ties=True),
        role="ours",
    )


def topk_of_parts(x: Tensor, k: int) -> Tensor:
    """What torch.topk can do past its own limits: the k largest of all are among each part's."""
    values, positions, start = [], [], 0
    for part in x.split(PART):
        top = torch.topk(part, min(k, part.numel()), sorted=False)
        values.append(top.values)
        positions.append(top.indices + start)
        start += part.numel()
    return torch.cat(positions)[torch.topk(torch.cat(values), k, sorted=False).indices]


def torch_ways(x: Tensor, k: int) -> list[Peer]:
    right = check_flat(x, k, first_ties=False)
    if x.numel() < 2**31:
        return [
            Peer(TOPK, lambda: torch.topk(x, k, sorted=False).indices, right),
            Peer(SORT, lambda: torch.sort(x, descending=True).indices[:k], right),
        ]
    too_many = f"not tried on {x.numel():,} scores in one piece, more than 2^31"
    return [
        absent(TOPK, too_many),
        Peer(TOPK_PARTS, lambda: topk_of_parts(x, k), right),
        absent(SORT, too_many),
    ]


def standalone(kind: str, n: int, k: int) -> list[Peer]:
    x = random_scores(kind, n)
    cub = optional(
        lambda: cuda_cub.cub_topk(x, k, check_flat(x, k, first_ties=False)), cuda_cub.NAME
    )
    return [reader([x]), ours(x, k), ours(x, k, "radix"), *torch_ways(x, k), cub]


def fused(n: int, k: int) -> list[Peer]:
    """The last accumulation leaves the maxima; then the selection reads what can matter."""
    grads = random_scores("lognormal, sigma 4", n).to(torch.bfloat16)
    squares = torch.zeros(n, device="cuda")
    maxima = torch.empty((n + 31) // 32, device="cuda")
    cuda.accumulate_squares_and_maxima_([squares], [grads], [], 1.0, [maxima])
    given = Arguments([squares], [], [k], [], "plain", 0.0, 0, "raise", "auto", [maxima])
    # Timed on accumulators of their own: what the selection reads must not change.
    other, other_maxima = squares.clone(), maxima.clone()
    weight = 2.0**-60

    def without() -> None:
        piece_ops.accumulate_squares_(other, grads, weight=weight)

    def with_maxima() -> None:
        cuda.accumulate_squares_and_maxima_([other], [grads], [], weight, [other_maxima])

    def together() -> Tensor:
        """As `Importance` does: nobody waits in between, so the host prepares meanwhile."""
        report = cuda.accumulate_squares_and_maxima_(
            [other], [grads], [], weight, [other_maxima], deferred=True
        )
        found = select(given._replace(first=[other], maxima=[other_maxima]))
        assert report is not None and report.tolist()[0] >= 1, "gradients must be finite"
        return found.indices

    return [
        reader([squares]),
        Peer(
            MAXIMA,
            lambda: select(given).indices,
            check_flat(squares, k, first_ties=True),
            role="ours",
        ),
        Peer(WITHOUT, without, role="ours", n_bytes=10 * n),
        Peer(WITH, with_maxima, role="ours", n_bytes=10 * n + n // 8),
        Peer(
            TOGETHER,
            together,
            check_flat(squares, k, first_ties=True),
            role="ours",
            n_bytes=10 * n + n // 4,
        ),
    ]


def on_top_of_the_accumulation(rows: Rows) -> float | None:
    """(accumulation with maxima and selection, in one go - accumulation alone) / one read.

    Not the difference of three separate calls: whichever came first after a pause of the GPU's
    clocks was slower by more than the maxima cost.
    """
    parts = [rows.get(name) for name in (TOGETHER, WITHOUT, "one read (torch.amax)")]
    times = [row.p50_ms for row in parts if row and row.times_ms]
    if len(times) < len(parts):
        return None
    longer, shorter, read = times
    return (longer - shorter) / read


def many(counts: Sequence[int], n: int, k: int) -> list[Peer]:
    flat = random_scores("Gaussian squared", n)
    right = check_flat(flat, k, first_ties=True)

    def peer(count: int) -> Peer:
        parts = list(flat.split(n // count))
        return Peer(
            f"{count:,} tensors",
            lambda: piece_ops.select_topk(parts, k),
            lambda top: right(joined(parts, top.indices)),
            role="ours",
        )

    return [reader([flat]), *map(peer, counts)]


def piece_s(n: int, k: int) -> list[Peer]:
    sums = random_scores("lognormal, sigma 4", n)
    squares = random_scores("Gaussian squared", n)
    score = piece_ops.Score("piece-s", sums, squares, constant=1.0)

    def materialise() -> Tensor:
        return sums.abs() / (squares + 1.0).sqrt()

    right = check_flat(materialise(), k, first_ties=True)
    return [
        reader([sums, squares]),
        Peer("piece_ops", lambda: piece_ops.select_topk(score, k).indices, right, role="ours"),
        Peer(
            "torch: score array, topk",
            lambda: torch.topk(materialise(), k, sorted=False).indices,
        ),
    ]


# ---- plans ------------------------------------------------------------------------------------


def plans(small: int = 1_000_000_000, large: int = 8_000_000_000) -> Iterator[Plan]:
    """The table of select_topk; sizes as arguments, so that a test can build them small."""

    def plan(
        name: str,
        n: int,
        our_bytes: float,
        targets: list[Target],
        build: Callable[[], list[Peer]],
        *,
        floor_bytes: int | None = None,
        more_ms: float = LAUNCHES_MS,
    ) -> Plan:
        floor = 4 * n if floor_bytes is None else floor_bytes
        return Plan(
            "select_topk",
            name,
            n,
            floor,
            targets,
            build,
            int(our_bytes),
            READ_GB_PER_S,
            more_ms,
            "float32",
        )

    faster = Target(
        "faster than torch.topk at its best",
        under_best([TOPK, TOPK_PARTS], "piece_ops"),
        4.0,
        at_most=False,
    )
    for kind, n, one_in in (
        ("Gaussian squared", small, 1000),
        ("Gaussian squared", large, 1000),
        ("lognormal, sigma 4", small, 1000),
        ("Fisher-like", small, 1000),
        ("Gaussian squared", small, 10_000),
        ("Gaussian squared", small, 100),
    ):
        yield plan(
            f"{kind}, n = {n:.0e} float32, k = {100 / one_in:g} %",
            n,
            (4.03 + 80.0 / one_in) * n,
            [one_read(1.15), faster],
            lambda kind=kind, n=n, one_in=one_in: standalone(kind, n, n // one_in),
        )
    yield plan(
        f"fused with the last accumulation, n = {small:.0e}, k = 0.1 %",
        small,
        0.30 * small,
        [
            Target(
                "on top of the accumulation / one read",
                on_top_of_the_accumulation,
                0.2,
                at_most=True,
            )
        ],
        lambda: fused(small, small // 1000),
        floor_bytes=small // 8,  # the maxima, once
    )
    for kind in ("all equal", "99 % zeros", "256 distinct values"):
        yield plan(
            f"{kind}, n = {small:.0e}, k = 0.1 %",
            small,
            4.4 * small,
            [one_read(2.5)],
            lambda kind=kind: standalone(kind, small, small // 1000),
        )
    yield plan(
        f"10,000 tensors of {small // 10_000:,}",
        small,
        4.15 * small,
        [no_slower("10,000 tensors", "10 tensors", "time / as ten tensors")],
        lambda: many((10, 10_000), small, small // 1000),
        more_ms=4.0,  # of host: some 0.4 us a tensor, most of it the 10,000 results
    )
    yield plan(
        f"PIECE-S of 2 x {small:.0e}",
        small,
        8.2 * small,
        [one_read(1.15, what="time / one read of both")],
        lambda: piece_s(small, small // 1000),
        floor_bytes=8 * small,
    )
