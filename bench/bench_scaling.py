"""Every op against the number of elements, density, number of tensors and threads.

The cost model of ``piece_ops.predict`` stands beside each time of ours (``predicted.py``), with the
bandwidth of the floor measured at the same place. One torch.topk goes along where it takes less
than some seconds. At 2e9 float32 elements the array alone has 8 GB, and at most 12 GB are held at a
time; what does not fit into memory is a row that says so. Random numbers are drawn once, 1e8 of
them, and repeated scaled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import piece_ops
from bench.bench_select_topk import TOPK, Check, torch_topk
from bench.harness import (
    Absent,
    Case,
    Peer,
    Target,
    hand_back,
    percent_of,
    require_memory,
    time_ratio,
)
from bench.inputs import gaussian_squared
from piece_ops import _native

OURS, COMPACT, READ, COPY = "piece_ops", "piece_ops, compact gradients", "one read", "one copy"
TOKENS, SAMPLES = 64, 8
SECONDS = 0.3  # of the timed calls of one row
BUDGET = 150.0  # seconds from the first sweep on; later only what has 1e8 elements or less
DRAWN = 10**8
BESIDE = 1e-3  # density, where it does not vary


def draw(n: int) -> Tensor:
    """n positive numbers."""
    drawn = gaussian_squared(min(n, DRAWN))
    if n <= DRAWN:
        return drawn
    made = torch.empty(n)
    for number, start in enumerate(range(0, n, DRAWN)):
        part = made[start : start + DRAWN]
        torch.mul(drawn[: part.numel()], 1 + number / 64, out=part)
    return made


class Store:
    """The arrays of a sweep, each as long as the largest of its sizes that fits into memory."""

    MAKE: ClassVar[dict[str, tuple[int, Callable[[int], Tensor]]]] = {
        "numbers": (4, draw),
        "zeros": (4, lambda n: torch.empty(n).zero_()),
        "ones": (2, lambda n: torch.ones(n, dtype=torch.bfloat16)),
        "spare": (2, lambda n: torch.empty(n // 2).zero_()),
    }

    def __init__(self) -> None:
        self.begun: float | None = None
        self.sizes: tuple[int, ...] = ()
        self.made: dict[str, Tensor] = {}

    def start(self, sizes: tuple[int, ...], needs_numbers: bool) -> None:
        """Drop what the next sweep does not need."""
        self.begun = time.monotonic() if self.begun is None else self.begun
        keep = needs_numbers and sizes == self.sizes
        self.made = {k: v for k, v in self.made.items() if keep and k in ("numbers", "spare")}
        hand_back()
        self.sizes = sizes

    def require_time(self, n: int) -> None:
        """Raise Absent if the sweeps have had their time and this is a large place of one."""
        assert self.begun is not None
        if n > DRAWN and time.monotonic() - self.begun > BUDGET:
            raise Absent(f"the sweeps before had taken {BUDGET:.0f} s")

    def take(self, kind: str, n: int) -> Tensor:
        """The first n elements (of spare: half as many)."""
        size, make = self.MAKE[kind]
        if kind not in self.made:
            for largest in sorted(set(self.sizes), reverse=True):
                try:
                    require_memory(1.05 * size * largest)
                except Absent:
                    if largest == min(self.sizes):
                        raise
                else:
                    self.made[kind] = make(largest)
                    break
        wanted = n // 2 if kind == "spare" else n
        if self.made[kind].numel() < wanted:
            raise Absent(f"no memory for {size * n / 1e9:.1f} GB of {kind} beside the rest")
        return self.made[kind][:wanted]


STORE = Store()


def spread(n: int, k: int) -> Tensor:
    """k increasing positions, one in each of k equal parts of n."""
    step = n // k
    g = torch.Generator().manual_seed(0)
    return torch.arange(k).mul_(step).add_(torch.randint(step, (k,), generator=g))


def in_parts(flat: Tensor, tensors: int) -> list[Tensor]:
    return list(flat.split(flat.numel() // tensors))


class Place:
    """One place of a sweep: how many elements, selected, tensors and threads, and which is x."""

    def __init__(
        self, n: int, x: float | None = None, k: int = 0, tensors: int = 1, threads: int = 0
    ) -> None:
        self.n, self.x = n, n if x is None else x
        self.k = k or max(1, int(BESIDE * n))
        self.tensors, self.threads = tensors, threads

    def peer(
        self, kernel: str, series: str, run: Any, n_bytes: float, role: Any, **more: Any
    ) -> Peer:
        at = {"x": self.x, "series": series, "kernel": kernel}
        at.update(n=self.n, k=self.k, tensors=self.tensors, **more.pop("at", {}))
        if self.threads:
            at["threads"] = self.threads
            run = self._on_threads(run)
        name = f"{series}, {self.x:,g}"
        return Peer(name, run, role=role, n_bytes=int(n_bytes), at=at, **more)

    def _on_threads(self, run: Callable[[], Any]) -> Callable[[], Any]:
        def there() -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                return run()
            finally:
                torch.set_num_threads(before)

        return there

    @property
    def flat(self) -> Tensor:
        return STORE.take("numbers", self.n)

    def read(self, kernel: str) -> Peer:
        flat = self.flat
        return self.peer(
            kernel, READ, partial(_native.read_bandwidth_probe, flat), 4 * self.n, "floor"
        )

    def copy(self, kernel: str) -> Peer:
        source, target = self.flat[: self.n // 2], STORE.take("spare", self.n)
        return self.peer(kernel, COPY, lambda: target.copy_(source), 2 * source.nbytes, "floor")

    def copy_zeros(self, kernel: str) -> Peer:
        """One half over the other: it says as much, and takes no memory of its own."""
        zeros, half = STORE.take("zeros", self.n), self.n // 2
        source, target = zeros[:half], zeros[half : 2 * half]
        return self.peer(kernel, COPY, lambda: target.copy_(source), 2 * source.nbytes, "floor")


# ---- ops: the rows of one place ---------------------------------------------------------------


def select(place: Place) -> list[Peer]:
    kernel, parts = "select_topk", in_parts(place.flat, place.tensors)
    check = Check(parts, place.k)
    rows = [
        place.read(kernel),
        place.peer(
            kernel,
            OURS,
            lambda: piece_ops.select_topk(parts, place.k),
            4 * place.n,
            "ours",
            check=check.ours,
        ),
    ]
    if place.n <= DRAWN and place.tensors == 1:
        topk = partial(torch_topk, place.flat, place.k)
        rows.append(place.peer(kernel, TOPK, topk, 4 * place.n, "peer", check=check.others))
    return rows


def accumulate(place: Place) -> list[Peer]:
    """bfloat16 gradients of 1 into what is there."""
    kernel, n = "accumulate_squares_", place.n
    squares, grads = STORE.take("zeros", n), STORE.take("ones", n)
    lists = in_parts(squares, place.tensors), in_parts(grads, place.tensors)

    def right(_: Any) -> str | None:
        return None if bool((squares[:: max(1, n // 1000)] == 1).all()) else "not 1"

    def run() -> None:
        piece_ops.accumulate_squares_(*lists)

    return [
        place.copy_zeros(kernel),
        place.peer(kernel, OURS, run, 10 * n, "ours", check=right, reset=squares.zero_),
    ]


def total(place: Place) -> list[Peer]:
    def right(got: float) -> str | None:
        # In parts: torch casts what it sums, twice the memory of all of it.
        want = sum(float(part.sum(dtype=torch.float64)) for part in place.flat.split(1 << 18))
        return None if abs(got - want) <= 1e-9 * want else f"{got} instead of {want}"

    run = partial(piece_ops.functional.total, place.flat)
    return [
        place.read("total"),
        place.peer("total", OURS, run, 4 * place.n, "ours", check=right),
    ]


def gather(place: Place) -> list[Peer]:
    indices = spread(place.n, place.k)

    def right(got: Tensor) -> str | None:
        return None if torch.equal(got, place.flat[indices]) else "other values"

    run = partial(piece_ops.gather, place.flat, indices)
    return [
        place.read("gather"),
        place.peer("gather", OURS, run, 16 * place.k, "ours", check=right),
    ]


def scatter(place: Place) -> list[Peer]:
    """The values that are there already."""
    indices = spread(place.n, place.k)
    values = place.flat[indices]

    def right(_: Any) -> str | None:
        return None if torch.equal(values, place.flat[indices]) else "other values"

    run = partial(piece_ops.functional.scatter_, place.flat, indices, values)
    return [
        place.copy("scatter_"),
        place.peer("scatter_", OURS, run, 16 * place.k, "ours", check=right),
    ]


def adamw(place: Place) -> list[Peer]:
    """No rate: the weights stay what they are, and every byte moves."""
    kernel = "sparse_adamw_"
    parts = in_parts(place.flat, place.tensors)
    indices = [spread(p.numel(), max(1, place.k // place.tensors)) for p in parts]
    values = [p[i] for p, i in zip(parts, indices, strict=True)]
    start = [v.clone() for v in values]
    grads, exp_avgs, exp_avg_sqs = ([torch.ones_like(v) for v in values] for _ in range(3))

    def step() -> None:
        piece_ops.sparse_adamw_(
            parts, indices, values, grads, exp_avgs, exp_avg_sqs, step=1, lr=0.0, weight_decay=0.0
        )

    def right(_: Any) -> str | None:
        same = all(map(torch.equal, values, start))
        return None if same and float(exp_avgs[0][0]) == 1.0 else "values moved at a rate of 0"

    return [
        place.copy(kernel),
        place.peer(kernel, COMPACT, step, 40 * place.k, "ours", check=right),
    ]


def factors(place: Place) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Gradient and input of a square linear layer with about n weights."""
    side = int(place.n**0.5)
    place.n = side * side
    g = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(TOKENS, side, generator=g) for _ in range(2))
    return grad, x, {"tokens": TOKENS, "out": side, "width": side}


def per_sample(place: Place) -> list[Peer]:
    kernel = "accumulate_per_sample_squares_"
    grad, x, at = factors(place)
    squares = STORE.take("zeros", place.n).view(at["out"], at["width"])
    offsets = torch.arange(SAMPLES + 1) * (TOKENS // SAMPLES)

    def right(_: Any) -> str | None:
        row = grad[:, :1].double().view(SAMPLES, -1, 1) * x.double().view(SAMPLES, -1, x.shape[1])
        want = row.sum(1).square().sum(0)
        error = float((squares[0].double() - want).abs().max() / want.max())
        return None if error < 1e-5 else f"off by {error:.1e} of the largest"

    def run() -> None:
        piece_ops.accumulate_per_sample_squares_(squares, grad, x, offsets)

    return [
        place.copy_zeros(kernel),
        place.peer(kernel, OURS, run, 8 * place.n, "ours", check=right, at=at, reset=squares.zero_),
    ]


def sampled(place: Place) -> list[Peer]:
    kernel = "sampled_weight_grad"
    grad, x, at = factors(place)
    indices = spread(place.n, place.k)

    def right(got: Tensor) -> str | None:
        some = indices[:: max(1, place.k // 1000)]
        rows, columns = some // at["width"], some % at["width"]
        want = (grad[:, rows].double() * x[:, columns].double()).sum(0)
        close = torch.allclose(got[:: max(1, place.k // 1000)].double(), want, 1e-4, 1e-4)
        return None if close else "other values"

    run = partial(piece_ops.functional.sampled_weight_grad, grad, x, indices)
    n_bytes = grad.nbytes + x.nbytes + 12 * place.k
    return [
        place.read(kernel),
        place.peer(kernel, OURS, run, n_bytes, "ours", check=right, at=at),
    ]


# ---- sweeps -----------------------------------------------------------------------------------

Op = Callable[[Place], list[Peer]]
OPS: dict[str, Op] = {
    "select_topk": select,
    "total": total,
    "gather": gather,
    "scatter_": scatter,
    "sparse_adamw_": adamw,
    "sampled_weight_grad": sampled,
    "accumulate_squares_": accumulate,
    "accumulate_per_sample_squares_": per_sample,
}
ON_NUMBERS = tuple(OPS)[:6]


def promises(op: str, places: list[Place]) -> list[Target]:
    """What holds at 1e8 elements must hold for as long as memory lasts."""
    made = []
    for place in places:
        at = f"{place.x:,g}"
        if place.n < DRAWN or place.x != place.n:
            continue
        if op == "select_topk":
            over = time_ratio(f"{OURS}, {at}", f"{READ}, {at}")
            made.append(Target(f"time / one read of the scores, {at}", over, 1.4, at_most=True))
        elif op == "accumulate_squares_":
            share = percent_of(f"{OURS}, {at}", f"{COPY}, {at}")
            made.append(Target(f"bandwidth / a copy's, {at}", share, 85, at_most=False, unit="%"))
    return made


def sweep(op: str, places: list[Place]) -> Case:
    peers: list[Peer] = []
    sizes = tuple(place.n for place in places)
    STORE.start(sizes, op in ON_NUMBERS)
    for place in places:
        try:
            STORE.require_time(place.n)
            peers += OPS[op](place)
        except (Absent, MemoryError, RuntimeError) as error:
            peers.append(place.peer(op, OURS, partial(_raise, error), 1, "ours"))
    n = max(sizes)
    return Case("scaling", "fp32", n, 4 * n, peers, promises(op, places), peer_seconds=SECONDS)


def _raise(error: Exception) -> None:
    raise Absent(str(error))


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    ns = (10_000, 20_000) if quick else (10**6, 10**7, 10**8, 10**9, 2 * 10**9)
    n, few = (20_000, 20_000) if quick else (10**8, 10**7)
    densities = (1e-3, 1e-1) if quick else (1e-4, 1e-3, 1e-2, 1e-1)
    counts = (1, 20) if quick else (1, 10, 100, 1000, 10_000)
    for op in OPS:
        yield f"{op} against elements", partial(sweep, op, [Place(n) for n in ns])
    for op in ("select_topk", "gather", "scatter_", "sparse_adamw_", "sampled_weight_grad"):
        places = [Place(n, share, max(1, int(share * n))) for share in densities]
        yield f"{op} against density, {n:.0e} elements", partial(sweep, op, places)
    for op in ("select_topk", "accumulate_squares_", "sparse_adamw_"):
        places = [Place(few, count, tensors=count) for count in counts]
        yield f"{op} against tensors, {few:.0e} elements", partial(sweep, op, places)
    for op in ("select_topk", "accumulate_squares_", "accumulate_per_sample_squares_"):
        threads = [Place(few, t, threads=t) for t in range(1, (os.cpu_count() or 1) + 1)]
        yield f"{op} against threads, {few:.0e} elements", partial(sweep, op, threads)
