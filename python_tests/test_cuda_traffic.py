"""How often select_topk reads the scores on emulated kernels, and in how many launches.

Reads are counted in pages, launch by launch.

The emulation closes the scores' pages before every launch and counts those that it opens. A launch
that reads a page twice counts once, which no kernel of select_topk does with scores.
"""

from __future__ import annotations

import math
import mmap
import platform
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor

from piece_ops.backends import cpu
from piece_ops.backends.cuda_select_topk import Arguments, select

from helpers import emulated
from helpers.cases import F32, F64, draw
from helpers.compare import assert_bits_equal
from helpers.emulated_select_topk import chunk_maxima, sampled_positions

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
    got = select(Arguments(*arguments, []), ways).tensors()
    touched = extension.touched_pages()
    extension.watch(0, 0)
    assert_bits_equal(got[0], cpu.select_topk(*arguments)[0], f"by {ways}")
    sampled = 0
    for number, way in enumerate(ways):  # a guess: the sample's launch, then the filter's
        if way not in ("sample", "resample"):
            break
        positions = sampled_positions(x.numel(), again=way == "resample")
        pages = touched.pop(number)
        assert pages == (positions * 4 // PAGE).unique().numel()  # it is the sample
        sampled += positions.numel() * SECTOR
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
    """Scores made to mislead the sample cost its read, the second sample's, and both samples.

    Of as few scores as here the samples are large: 0.06 and 0.25 of a read, against 0.002 and 0.008
    past 3e7 scores.
    """
    x = draw("gaussian_squared", N, F32, rng)
    x[sampled_positions(N)[::8]] += 1000  # one in 8 of the sample, one in 1024 of all
    assert 2 < reads(extension, x, N // 100) <= 2.5  # the bound was too high
    x = draw("gaussian_squared", N, F32, rng) + 1000
    x[sampled_positions(N)] -= 1000
    assert 2 < reads(extension, x, N // 1000) <= 2.5  # too low
    assert reads(extension, x, N // 1000, "radix") <= 3


def test_both_samples_missed(extension: ModuleType, rng: Generator) -> None:
    """Scores made to mislead both: exact by the digits, after two reads in vain."""
    x = draw("gaussian_squared", N, F32, rng) + 1000
    for again in (False, True):
        x[sampled_positions(N, again=again)] -= 1000
    assert 4 < reads(extension, x, N // 1000) <= 6.5


# ---- launches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "algorithm", "dtype", "share", "launches"),
    [
        ("sample", "auto", F32, 0.001, 11),
        ("digits", "radix", F32, 0.001, 11),
        ("maxima", "radix", F32, 0.001, 11),
        ("digits", "auto", F32, 0.5, 8),  # dense: nothing is kept that had a threshold to look for
        ("sample", "auto", F64, 0.001, 17),
    ],
)
def test_launches_of_a_call(
    extension: ModuleType,
    way: str,
    algorithm: str,
    dtype: torch.dtype,
    share: float,
    launches: int,
    rng: Generator,
) -> None:
    """As many as the manual and the design say; where a step is not needed it returns at once."""
    x = draw("gaussian_squared", 1 << 17, F32, rng).to(dtype)
    k = int(x.numel() * share)
    maxima = chunk_maxima([x]) if way == "maxima" else []
    arguments = Arguments([x], [], [k], [], "plain", 0.0, 7, "raise", algorithm, maxima)
    select(arguments)  # brings the table
    before, ways = extension.launch_count(), list[str]()
    select(arguments, ways)
    assert (ways, extension.launch_count() - before) == ([way], launches)
    manual = (emulated.ROOT / "csrc" / "cuda" / "select_topk.cu").read_text()
    design = (emulated.ROOT / "docs" / "design.md").read_text()
    if dtype == F32 and share < 0.25:
        assert re.search(rf"\b{launches} launches\b", manual)
        assert re.search(rf"\b{launches} launches\b", design)
    elif dtype == F64:
        assert f"float64: {launches}" in manual
    else:
        assert f"dense: {launches}" in manual


# ---- with maxima ------------------------------------------------------------------------------


def chunks_that_matter(scores: Tensor, k: int) -> int:
    """Chunks of 32 whose largest score reaches the sample's bound."""
    positions = sampled_positions(scores.numel())
    expected = k * positions.numel() / scores.numel()
    rank = math.ceil(expected + 3 * math.sqrt(expected) + 4)
    bound = scores[positions].topk(rank).values[-1]
    return int((scores.view(-1, 32).amax(1) >= bound).sum())


def test_only_chunks_that_matter_are_read(extension: ModuleType, rng: Generator) -> None:
    """Tensors of one chunk each, a page apart, so that a page touched is a chunk read."""
    count, k = 4096, 131
    scores = draw("gaussian_squared", count * 32, F32, rng)
    memory = torch.frombuffer(mmap.mmap(-1, count * PAGE), dtype=F32).view(count, -1)
    memory[:, -32:] = scores.view(count, 32)
    first = [row[-32:] for row in memory]
    of_chunks = torch.frombuffer(mmap.mmap(-1, count * 4), dtype=F32)
    of_chunks.copy_(scores.view(count, 32).amax(1))
    arguments = (first, [], [k], [], "plain", 0.0, 7, "raise", "auto")
    found = []
    for watched in (memory, of_chunks):
        extension.watch(watched.data_ptr(), watched.numel() * 4)
        ways: list[str] = []
        got = select(Arguments(*arguments, [*of_chunks.split(1)]), ways).tensors()
        found.append(extension.touched_pages())
        extension.watch(0, 0)
        assert ways == ["sample"]
        assert_bits_equal(got[0], cpu.select_topk(*arguments)[0], "by the maxima")
    _, *of_scores = found[0]  # the first launch that touches scores is the sample's
    matter = chunks_that_matter(scores, k)
    assert of_scores == [matter], f"of {count} chunks"
    assert matter < count / 8
    assert found[1] == [count * 4 // PAGE]  # the maxima: once


def sampled_share(n: int, k: int) -> float:
    """The share of independent scores that exceed the sample's bound, on average."""
    length = max(min(n // 8192, 4096), n >> 19)
    sampled = n / length
    expected = k / length
    return math.ceil(expected + 3 * math.sqrt(expected) + 4) / sampled


def bytes_an_element(n: int, k: int) -> float:
    """Maxima, chunks of 128 bytes that hold something above the bound, and the sample's sectors."""
    length = max(min(n // 8192, 4096), n >> 19)
    return 4 / 32 + 128 / 32 * (1 - (1 - sampled_share(n, k)) ** 32) + SECTOR / length


def test_bytes_an_element_with_maxima(rng: Generator) -> None:
    """By that rule, counted on 3e7 scores as it is expected; and so for 1e9 and 8e9.

    A small sample needs a wide margin: 0.44 bytes of 3e7 scores, at k = 0.1 %.
    """
    n = 1 << 25
    scores = torch.randn(n, generator=rng).square_()
    chunks = chunks_that_matter(scores, n // 1000)
    n_bytes = (chunks * 128 + sampled_positions(n).numel() * SECTOR) / n + 4 / 32
    # The bound is the 21st of 8192: the share above it errs by a fifth.
    assert n_bytes == pytest.approx(bytes_an_element(n, n // 1000), rel=0.25)
    for large in (10**9, 8 * 10**9):
        assert 0.25 <= bytes_an_element(large, large // 1000) <= 0.4
