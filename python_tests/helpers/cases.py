"""Generated inputs: sizes at the edges, distributions that hurt, and lists cut from one array."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16, "fp64": F64}

# Under a sanitizer, where everything costs ten or a hundred times as much, this is above 1: large
# numbers of elements, tensors and generated cases are divided by it. EDGE_SIZES stay as they are.
ONE_IN = int(os.environ.get("PIECE_OPS_ONE_IN", "1"))
Item = TypeVar("Item")


def fewer(n: int) -> int:
    """n, or what is left of it under a sanitizer."""
    return n if ONE_IN == 1 else max(1, n // ONE_IN)


def some(items: Iterable[Item], name: str) -> list[Item]:
    """All items, or one in ONE_IN and at least one under a sanitizer; the name says the first."""
    found = list(items)
    return found[zlib.crc32(name.encode()) % max(1, min(ONE_IN, len(found))) :: ONE_IN]


# n - 1, n, n + 1 of vectors (16, 64), tiles (1024) and blocks (65536); 0; primes; past a megabyte.
EDGE_SIZES = (0, 1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4099)
LARGE_SIZES = tuple(fewer(n) for n in (65535, 65536, 65537, 104729, 2**20 + 3))


def _few(values: tuple[float, ...]) -> Callable[[int, Generator], Tensor]:
    def draw(n: int, g: Generator) -> Tensor:
        table = torch.tensor(values, dtype=F64)
        return table[torch.randint(len(values), (n,), generator=g)]

    return draw


def _normal(n: int, g: Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=F64)


def _sprinkled(base: Callable[[int, Generator], Tensor], values: tuple[float, ...], share: float):
    """`base` with a share of its elements replaced by one of `values`."""

    def draw(n: int, g: Generator) -> Tensor:
        x = base(n, g)
        hit = torch.rand(n, generator=g) < share
        return torch.where(hit, _few(values)(n, g), x)

    return draw


def _run_of_large(n: int, g: Generator) -> Tensor:
    """All large values in one contiguous run: a sample of every stride sees them or none."""
    x = torch.rand(n, generator=g, dtype=F64)
    length = max(1, n // 100)
    start = int(torch.randint(max(1, n - length), (1,), generator=g)) if n else 0
    x[start : start + length] += 10
    return x


def _stride_of_large(n: int, g: Generator) -> Tensor:
    """All large values at one stride, in turn with a sampler's own stride or never with it."""
    x = torch.rand(n, generator=g, dtype=F64)
    step = (64, 97, 128, 1000, 1024)[int(torch.randint(5, (1,), generator=g))]
    x[int(torch.randint(step, (1,), generator=g)) :: step] += 10
    return x


def _tail_of_large(n: int, g: Generator) -> Tensor:
    x = torch.rand(n, generator=g, dtype=F64)
    x[n - max(1, n // 200) if n else 0 :] += 10
    return x


INF, NAN = float("inf"), float("nan")
# Smallest subnormal, a middle one and the smallest normal number of float32.
SUBNORMAL = (2.0**-149, 3 * 2.0**-149, 2.0**-130, 2.0**-126, 0.0, -(2.0**-149), -0.0)

DISTRIBUTIONS: dict[str, Callable[[int, Generator], Tensor]] = {
    "gaussian_squared": lambda n, g: _normal(n, g) ** 2,
    "lognormal4": lambda n, g: torch.exp(4 * _normal(n, g)),
    "normal": _normal,
    "negative": lambda n, g: -torch.exp(_normal(n, g)),
    "few_values": _few((0.0, 0.5, 1.0, 2.0, -1.0)),
    "all_equal": lambda n, g: torch.full((n,), 0.25, dtype=F64),
    "all_zero": lambda n, g: torch.zeros(n, dtype=F64),
    "signed_zeros": _few((0.0, -0.0)),
    "zeros_99": _sprinkled(lambda n, g: torch.zeros(n, dtype=F64), (1.0, 2.0, 3.0, 1e-3), 0.01),
    "ascending": lambda n, g: torch.arange(n, dtype=F64),
    "descending": lambda n, g: -torch.arange(n, dtype=F64),
    "infinities": _sprinkled(_normal, (INF, -INF), 0.05),
    "all_inf": _few((INF,)),
    "subnormal": _few(SUBNORMAL),
    "subnormal_mixed": _sprinkled(lambda n, g: _normal(n, g) * 2.0**-127, SUBNORMAL, 0.5),
    "narrow": lambda n, g: 1 + torch.randint(64, (n,), generator=g).double() * 2.0**-20,
    "run_of_large": _run_of_large,
    "stride_of_large": _stride_of_large,
    "tail_of_large": _tail_of_large,
    "with_nan": _sprinkled(_normal, (NAN, -NAN), 0.1),
    "with_nan_inf": _sprinkled(_normal, (NAN, INF, -INF, -0.0), 0.3),
    "all_nan": _few((NAN,)),
}
NAN_DISTRIBUTIONS = {"with_nan", "with_nan_inf", "all_nan"}


def draw(name: str, n: int, dtype: torch.dtype, g: Generator) -> Tensor:
    """n elements of the distribution called `name`, in `dtype` (fp16 may overflow to inf)."""
    return DISTRIBUTIONS[name](n, g).to(dtype)


def pick(g: Generator, choices: Any) -> Any:
    """One of a sequence, by the generator."""
    return choices[int(torch.randint(len(choices), (1,), generator=g))]


def cut(x: Tensor, pieces: int, g: Generator) -> list[Tensor]:
    """Copies of `pieces` consecutive parts of x; some are empty, one in eight is 2-D or 0-D."""
    n = x.numel()
    ends = [*sorted(torch.randint(n + 1, (pieces - 1,), generator=g).tolist()), n]
    parts, start = [], 0
    for end in ends:
        part = x[start:end].clone()
        if int(torch.randint(8, (1,), generator=g)) == 0:
            if part.numel() == 1:
                part = part.reshape(())
            elif part.numel() % 2 == 0:
                part = part.reshape(2, -1)
        parts.append(part)
        start = end
    return parts


def some_positions(n: int, share: float, g: Generator) -> Tensor:
    """Strictly increasing int64 positions below n, about `share` of them."""
    return torch.nonzero(torch.rand(n, generator=g) < share).flatten()


@dataclass
class SelectCase:
    """The arguments of one select_topk call, and a name that repeats them."""

    name: str
    scores: Any
    k: Any
    options: dict[str, Any] = field(default_factory=dict)


def k_values(n: int) -> list[int]:
    """The numbers to select from n candidates: the ends, 0.1 %, 10 %, 50 %."""
    return sorted({0, min(1, n), max(0, n - 1), n, n // 1000, n // 10, n // 2})


def select_cases(
    dtype: torch.dtype | None, distribution: str, g: Generator, sizes: tuple[int, ...]
) -> list[SelectCase]:
    """For each size: every k on one tensor, then lists with every option. dtype None: mixed."""
    return some(_select_cases(dtype, distribution, g, sizes), f"{dtype} {distribution}")


def _select_cases(
    dtype: torch.dtype | None, distribution: str, g: Generator, sizes: tuple[int, ...]
) -> Iterator[SelectCase]:
    nan = {"nan": "lowest"} if distribution in NAN_DISTRIBUTIONS else {}
    for n in sizes:
        for k in k_values(n):
            algorithm = pick(g, ("auto", "filter", "radix"))
            one = draw(distribution, n, dtype or F32, g)
            name = f"{distribution} n={n} k={k} {algorithm}"
            yield SelectCase(f"{name} one", one, k, {"algorithm": algorithm, **nan})
            yield _list_case(name, distribution, n, k, algorithm, dtype, nan, g)


def _list_case(
    name: str,
    distribution: str,
    n: int,
    k: int,
    algorithm: str,
    dtype: torch.dtype | None,
    nan: dict[str, str],
    g: Generator,
) -> SelectCase:
    pieces = int(torch.randint(1, 12, (1,), generator=g))
    parts = cut(draw(distribution, n, F64, g), pieces, g)
    parts = [p.to(dtype or pick(g, (F32, BF16, F16))) for p in parts]
    options: dict[str, Any] = {"algorithm": algorithm, **nan}
    excluded = [torch.empty(0, dtype=torch.int64)] * pieces
    if pick(g, (True, False)):
        excluded = [some_positions(p.numel(), pick(g, (0.0, 0.05, 0.9)), g) for p in parts]
        options["exclude"] = [e if e.numel() or pick(g, (0, 1)) else None for e in excluded]
        name += " exclude"
    free = [p.numel() - e.numel() for p, e in zip(parts, excluded, strict=True)]
    ks: Any = min(k, sum(free))
    if pick(g, (True, False, False)):
        options["scope"] = "tensor"
        ks = [pick(g, k_values(f)) for f in free]
        name += " per tensor"
    if pick(g, (True, False)):
        keys = [f"t{i}" for i in range(pieces)]
        parts_dict = dict(zip(keys, parts, strict=True))
        if "exclude" in options:
            pairs = zip(keys, options["exclude"], strict=True)
            options["exclude"] = {key: e for key, e in pairs if e is not None}
        return SelectCase(f"{name} dict of {pieces}", parts_dict, ks, options)
    return SelectCase(f"{name} list of {pieces}", parts, ks, options)
