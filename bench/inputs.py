"""Inputs that several benchmarks share: distributions, and the tensors of SmolLM2-135M."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

DRAWN = 50_000_000  # numbers of one generator: 0.2 s


def normal(n: int, seed: int = 0) -> Tensor:
    """n normal numbers; 1e9 of them take 2.5 s of two threads. A smaller n gives the first ones."""
    x = torch.empty(n)

    def fill(part: tuple[int, Tensor]) -> None:
        number, numbers = part
        numbers.normal_(generator=torch.Generator().manual_seed(1000 * seed + number))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, enumerate(x.split(DRAWN))))
    return x


def gaussian_squared(n: int, seed: int = 0) -> Tensor:
    x = normal(n, seed)
    return x.mul_(x)


def lognormal(n: int, sigma: float = 4.0, seed: int = 0) -> Tensor:
    return normal(n, seed).mul_(sigma).exp_()


def all_equal(n: int) -> Tensor:
    return torch.full((n,), 0.25)


def zeros_99(n: int, seed: int = 0) -> Tensor:
    """99 % zeros, the rest uniform."""
    x = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return x.sub_(0.99).clamp_(min=0.0)


def ascending(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float32)


def values_256(n: int, seed: int = 0) -> Tensor:
    """256 distinct values, as 8-bit quantised scores have."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n,), generator=g, dtype=torch.uint8).float()


def smollm2_shapes() -> list[tuple[int, ...]]:
    """The 272 parameter tensors of SmolLM2-135M (134,515,008 elements), in the model's order.

    Llama architecture: vocabulary 49152, width 576, 30 layers, 9 heads and 3 key/value heads of
    64, feed-forward 1536, output embedding tied to the input's.
    """
    vocabulary, width, layers, hidden, head = 49152, 576, 30, 1536, 64
    queries, keys = 9 * head, 3 * head
    layer: list[tuple[int, ...]] = [
        (queries, width),
        (keys, width),
        (keys, width),
        (width, queries),
        (hidden, width),
        (hidden, width),
        (width, hidden),
        (width,),
        (width,),
    ]
    return [(vocabulary, width), *(layer * layers), (width,)]


def count_elements(shapes: list[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def split_like(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Views of consecutive parts of one flat tensor."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = flat.split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def random_positions(n: int, k: int, seed: int = 0) -> Tensor:
    """k distinct increasing positions below n (int64)."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (k + k // 4 + 16,), generator=g).unique()  # sorted
    keep = torch.randperm(drawn.numel(), generator=g)[:k]
    return drawn[keep.sort().values]
