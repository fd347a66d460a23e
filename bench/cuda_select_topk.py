"""select_topk on a GPU: rows with their bytes, floors and predictions, beside their peers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.cuda_timing import READ_GB_PER_S, Peer, Row, optional, reader
from piece_ops.backends import cuda, cuda_select_topk

LAUNCHES_MS = 0.05  # some 20 small kernels around the one read


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


# ---- peers ------------------------------------------------------------------------------------


def ours(scores: Any, k: int, check: Any = None, algorithm: str = "auto") -> Peer:
    name = "piece_ops" if algorithm == "auto" else f"piece_ops, {algorithm}"
    return Peer(name, lambda: piece_ops.select_topk(scores, k, algorithm=algorithm), check)


def torch_topk(x: Tensor, k: int) -> Peer:
    return Peer(
        "torch.topk",
        lambda: torch.topk(x, k, sorted=False).indices,
        check_flat(x, k, first_ties=False),
    )


def cub_topk(x: Tensor, k: int) -> Peer:
    """DeviceTopK, compiled now; it takes any of the ties and is not deterministic."""
    library = _cub()
    values = torch.empty(k, dtype=torch.float32, device=x.device)
    positions = torch.empty(k, dtype=torch.int64, device=x.device)
    n_bytes = library.cub_topk_bytes(x.numel(), k)
    if n_bytes < 0:
        raise RuntimeError("the toolkit's CUB has no DeviceTopK (CCCL 3.2 and later have)")
    scratch = torch.empty(n_bytes, dtype=torch.uint8, device=x.device)

    def run() -> Tensor:
        pointers = [t.data_ptr() for t in (x, values, positions)]
        stream = torch.cuda.current_stream().cuda_stream
        done = library.cub_topk(scratch.data_ptr(), n_bytes, *pointers, x.numel(), k, stream)
        if done < 0:
            raise RuntimeError(f"CUB failed with {-1 - done}")
        return positions

    return Peer("cub::DeviceTopK", run, check_flat(x, k, first_ties=False))


_library: list[Any] = []


def _cub() -> Any:
    if _library:
        return _library[0]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    folder = Path(tempfile.mkdtemp(prefix="piece_ops-bench-"))
    command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-arch=native"]
    command += ["-o", str(folder / "cub.so"), str(Path(__file__).parent / "peers_cub_topk.cu")]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"no nvcc: {error}") from error
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.splitlines()[0]}")
    library = ctypes.CDLL(str(folder / "cub.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.cub_topk_bytes.argtypes = [number, number]
    library.cub_topk_bytes.restype = number
    library.cub_topk.argtypes = [pointer, number, pointer, pointer, pointer, number, number]
    library.cub_topk.argtypes += [pointer]
    library.cub_topk.restype = number
    _library.append(library)
    return library


# ---- rows -------------------------------------------------------------------------------------


def random_scores(kind: str, n: int) -> Tensor:
    """Made on the GPU, in place, in pieces where the generator needs it."""
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(n, device="cuda")
    for part in x.split(1 << 30):
        if kind == "Gaussian squared":
            part.normal_(generator=g).square_()
        elif kind == "lognormal, sigma 4":
            part.normal_(generator=g).mul_(4.0).exp_()
        elif kind == "all equal":
            part.fill_(0.25)
        elif kind == "99 % zeros":
            part.uniform_(generator=g).sub_(0.99).clamp_(min=0.0)
        else:
            part.uniform_(generator=g).mul_(256).floor_()
    return x


def standalone(kind: str, n: int, k: int) -> list[Peer]:
    x = random_scores(kind, n)
    right = check_flat(x, k, first_ties=True)
    mine = [
        Peer(peer.name, lambda run=peer.run: run().indices, right)
        for peer in (ours(x, k), ours(x, k, algorithm="radix"))
    ]
    peers = [reader([x]), *mine]
    if n < 2**32:
        peers.append(torch_topk(x, k))
    peers.append(optional(lambda: cub_topk(x, k), "cub::DeviceTopK"))
    return peers


def fused(n: int, k: int) -> list[Peer]:
    """The last accumulation leaves the maxima; then the selection reads what can matter."""
    grads = random_scores("lognormal, sigma 4", n).to(torch.bfloat16)
    squares = torch.zeros(n, device="cuda")
    maxima = torch.empty((n + 31) // 32, device="cuda")
    cuda.accumulate_squares_and_maxima_([squares], [grads], [], 1.0, [maxima])
    select = ([squares], [], [k], [], "plain", 0.0, 0, "raise", "auto", [maxima])
    right = check_flat(squares, k, first_ties=True)
    # Timed on accumulators of their own: what the selection reads must not change.
    other, other_maxima = squares.clone(), maxima.clone()
    weight = 2.0**-60
    return [
        reader([squares]),
        Peer(
            "piece_ops, by the maxima",
            lambda: cuda_select_topk.select_topk_by_maxima(*select)[0],
            right,
        ),
        Peer(
            "accumulation",
            lambda: piece_ops.accumulate_squares_(other, grads, weight=weight),
        ),
        Peer(
            "accumulation with maxima",
            lambda: cuda.accumulate_squares_and_maxima_(
                [other], [grads], [], weight, [other_maxima]
            ),
        ),
    ]


def many(count: int, n: int, k: int) -> list[Peer]:
    flat = random_scores("Gaussian squared", n)
    right = check_flat(flat, k, first_ties=True)

    def peer(pieces: int) -> Peer:
        parts = list(flat.split((n + pieces - 1) // pieces))
        return Peer(
            f"piece_ops, {len(parts):,} tensors",
            lambda: piece_ops.select_topk(parts, k),
            lambda top: right(joined(parts, top.indices)),
        )

    return [reader([flat]), peer(10), peer(count)]


def piece_s(n: int, k: int) -> list[Peer]:
    sums = random_scores("lognormal, sigma 4", n)
    squares = random_scores("Gaussian squared", n)
    score = piece_ops.Score("piece-s", sums, squares, constant=1.0)

    def materialise() -> Tensor:
        return sums.abs() / (squares + 1.0).sqrt()

    right = check_flat(materialise(), k, first_ties=True)
    return [
        reader([sums, squares]),
        Peer("piece_ops, fused", lambda: piece_ops.select_topk(score, k).indices, right),
        Peer(
            "torch: score array, topk",
            lambda: torch.topk(materialise(), k, sorted=False).indices,
        ),
    ]


def rows(small: int = 1_000_000_000, large: int = 8_000_000_000) -> Iterator[Row]:
    """The table of select_topk; sizes as arguments, so that a test can build them small."""

    def row(
        name: str,
        floor: int,
        ours: float,
        target: str,
        build: Callable[[], Any],
        more_ms: float = LAUNCHES_MS,
    ) -> Row:
        return Row("select_topk", name, floor, target, build, int(ours), READ_GB_PER_S, more_ms)

    faster = "<= 1.15 x one read; >= 4 x faster than torch.topk"
    for kind, n in (
        ("Gaussian squared", small),
        ("lognormal, sigma 4", small),
        ("Gaussian squared", large),
    ):
        yield row(
            f"{kind}, n = {n:.0e} float32, k = 0.1 %",
            4 * n,
            4.10 * n,
            faster,
            lambda kind=kind, n=n: standalone(kind, n, n // 1000),
        )
    yield row(
        f"fused with the last accumulation, n = {small:.0e}",
        4 * small,
        0.30 * small,
        "<= 0.2 x one read on top of the accumulation",
        lambda: fused(small, small // 1000),
    )
    for kind in ("all equal", "99 % zeros", "256 distinct values"):
        yield row(
            f"{kind}, n = {small:.0e}",
            4 * small,
            4.4 * small,
            "exact, <= 2.5 x one read",
            lambda kind=kind: standalone(kind, small, small // 1000),
        )
    yield row(
        f"10,000 tensors of {small // 10_000:,}",
        4 * small,
        4.15 * small,
        "<= 1.3 x the time of ten tensors",
        lambda: many(10_000, small, small // 1000),
        more_ms=25.0,  # of host: some 2.5 us of Python a tensor
    )
    yield row(
        f"PIECE-S of 2 x {small:.0e}",
        8 * small,
        8.2 * small,
        "<= 1.15 x one read of both",
        lambda: piece_s(small, small // 1000),
    )
