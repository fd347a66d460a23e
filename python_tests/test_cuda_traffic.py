"""How often select_topk reads the scores on emulated kernels: counted in pages, launch by launch.

The emulation closes the scores' pages before every launch and counts those that it opens. A launch
that reads a page twice counts once, which no kernel of select_topk does with scores.
"""

from __future__ import annotations

import mmap
import platform
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor

from piece_ops.backends import cpu, cuda_select_topk

from helpers import emulated
from helpers.cases import F32, draw
from helpers.compare import assert_bits_equal
from helpers.emulated_select_topk import sampled_positions

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
)
N = 1 << 20
PAGE = mmap.PAGESIZE
SECTOR = 32  # bytes that one sampled score costs on a GPU; a page of it counts as nothing here


@pytest.fixture(scope="module")
def extension() -> Iterator[ModuleType]:
    module = emulated.load(emulated.build("plain"))
    with emulated.emulation(module):
        module.set_device(2, 2)
        yield module


def reads(extension: ModuleType, scores: Tensor, k: int, algorithm: str = "auto") -> float:
    """Select; compare with the CPU; bytes of scores read over bytes of scores."""
    n_bytes = scores.numel() * scores.element_size()
    memory = mmap.mmap(-1, n_bytes)
    x = torch.frombuffer(memory, dtype=scores.dtype).copy_(scores)
    arguments = ([x], [], [k], [], "plain", 0.0, 7, "raise", algorithm)
    extension.watch(x.data_ptr(), n_bytes)
    ways: list[str] = []
    got = cuda_select_topk.select_topk_by_maxima(*arguments, [], ways)
    touched = extension.touched_pages()
    extension.watch(0, 0)
    assert_bits_equal(got[0], cpu.select_topk(*arguments)[0], f"by {ways}")
    sampled = 0
    if ways[0] == "sample":
        positions = sampled_positions(x.numel())
        assert touched[0] == (positions * 4 // PAGE).unique().numel()  # it is the sample
        sampled, touched = positions.numel() * SECTOR, touched[1:]
    return (sampled + sum(touched) * PAGE) / n_bytes


HOSTILE: dict[str, Callable[[Generator], Tensor]] = {
    name: lambda g, name=name: draw(name, N, F32, g)
    for name in ("all_equal", "all_zero", "zeros_99", "few_values", "signed_zeros", "narrow")
}
HOSTILE["256 values"] = lambda g: torch.randint(256, (N,), generator=g).float()


@pytest.mark.parametrize("share", [0.001, 0.19])
@pytest.mark.parametrize("name", HOSTILE)
def test_few_distinct_values(
    extension: ModuleType, name: str, share: float, rng: Generator
) -> None:
    """The one filtering read; then, of the tiles whose ties are wanted, a second one."""
    assert reads(extension, HOSTILE[name](rng), int(N * share)) <= 2.1


@pytest.mark.parametrize("name", ["gaussian_squared", "lognormal4", "ascending", "descending"])
def test_distinct_values(extension: ModuleType, name: str, rng: Generator) -> None:
    assert reads(extension, draw(name, N, F32, rng), N // 1000) <= 1.3


def test_a_missed_sample(extension: ModuleType, rng: Generator) -> None:
    """Scores made to mislead the sample: its filtering read, the digits' one or two, theirs."""
    x = draw("gaussian_squared", N, F32, rng)
    x[sampled_positions(N)[::8]] += 1000  # one in 8 of the sample, one in 1024 of all
    assert reads(extension, x, N // 100) <= 3.1
    x = draw("gaussian_squared", N, F32, rng) + 1000
    x[sampled_positions(N)] -= 1000
    assert reads(extension, x, N // 1000) <= 4.1
    assert reads(extension, x, N // 1000, "radix") <= 3
