"""Small selections that together reach every kernel and every barrier of csrc/cuda/select_topk*.cu.

For the sanitizers and for leaving barriers out, where a run costs a hundred times the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from piece_ops.backends import cpu
from piece_ops.backends.cuda_select_topk import Arguments, select

from helpers.cases import BF16, F16, F32, draw, some_positions

Run = Callable[[], Any]


def sampled_positions(n: int, *, again: bool = False) -> Tensor:
    """The positions that the sample, or the second one, looks at (select_topk_bound.cu)."""
    length = max(min(max(n // 8192, 16), 4096), n >> 19) // (4 if again else 1)
    salt = 0xD1B54A32D192ED03 if again else 0
    mask, found = (1 << 64) - 1, []
    for s in range((n + length - 1) // length):
        h = (s * 0x9E3779B97F4A7C15) & mask ^ salt
        h = ((h ^ (h >> 29)) * 0xBF58476D1CE4E5B9) & mask
        own = min(length, n - s * length)
        found.append(s * length + (((h >> 32) * own) >> 32))
    return torch.tensor(found)


def chunk_maxima(first: list[Tensor]) -> list[Tensor]:
    """The largest of every 32 elements of float32 scores."""
    padded = [torch.nn.functional.pad(x, (0, -x.numel() % 32), value=-1e30) for x in first]
    return [x.view(-1, 32).amax(1) if x.numel() else x for x in padded]


def cases(g: torch.Generator) -> Iterator[tuple[str, Run, Run]]:
    """Name, the selection on CUDA, the same one on the CPU: each gives a list of tensors."""

    def case(
        name: str,
        first: list[Tensor],
        k: list[int],
        second: tuple[Tensor, ...] = (),
        exclude: tuple[Tensor, ...] = (),
        score: str = "plain",
        nan: str = "raise",
        algorithm: str = "auto",
        maxima: tuple[Tensor, ...] = (),
    ) -> tuple[str, Run, Run]:
        a = (first, list(second), k, list(exclude), score, 0.5, 3, nan, algorithm)
        return (
            f"select_topk {name} {algorithm}",
            lambda: list(select(Arguments(*a, list(maxima))).tensors()),
            lambda: list(cpu.select_topk(*a)),
        )

    sizes = (17_003, 0, 4096, 5)
    plain = [draw("gaussian_squared", n, F32, g) for n in sizes]
    few = [draw("few_values", n, F32, g) for n in sizes]
    exclude = tuple(some_positions(n, 0.05, g) for n in sizes)
    mixed = [x[1:].to(t) for x, t in zip(plain, (BF16, F32, F16, F32), strict=True)]
    large = draw("lognormal4", 70_001, F32, g)
    # 70,001 is dense above 17,500; the digits' search of it merges its counters on the way.
    yield case("sample", plain, [21])
    yield case("digits", plain, [300], algorithm="radix")
    yield case("ties at the bound", few, [9000], exclude=exclude)
    yield case("dense", [large], [40_000])
    yield case("small", plain, [300, 0, 40, 2], exclude=exclude)
    yield case("small ties", few, [4000, 0, 1000, 2])
    yield case("maxima", [large], [70], maxima=tuple(chunk_maxima([large])))
    yield case(
        "maxima, digits", [large], [70], algorithm="radix", maxima=tuple(chunk_maxima([large]))
    )
    yield case("maxima, ties", few, [2000], maxima=tuple(chunk_maxima(few)), exclude=exclude)
    tiny = [draw("gaussian_squared", 40 + n, F32, g) for n in range(60)]  # two tiles a warp
    yield case("maxima of tiny ones", tiny, [80], maxima=tuple(chunk_maxima(tiny)))
    yield case("mixed", mixed, [200])
    yield case("two", mixed, [200], tuple(x[1:] for x in plain), score="piece-s")
    yield case("hash", plain, [200], score="random")
    yield case("double", [x.double() for x in plain], [200])
    yield case("double, dense", [large.double()], [30_000], algorithm="radix")
    # 4 blocks take 25 tiles. Of some 640 kept scores a batch holds one; 1100 it does not hold.
    many = draw("lognormal4", 100_001, F32, g)
    for k in (15_000, 25_000):
        yield case("many kept", [many], [k])
        yield case("double, many kept", [many.double()], [k])
    yield case("double, small", [x.double() for x in plain], [200, 0, 40, 2])
    nan = [x.clone() for x in plain]
    nan[2][::7] = float("nan")
    yield case("NaN", nan, [20_900], nan="lowest")
