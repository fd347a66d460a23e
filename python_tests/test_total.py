"""total: the sum of all elements in float64, the same bits however the work is divided."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from piece_ops import reference
from piece_ops.functional import total

from helpers.cases import BF16, DTYPES, EDGE_SIZES, F16, F32, LARGE_SIZES, cut, draw, fewer, pick
from helpers.compare import assert_all_bits_equal
from helpers.tolerances import TOTAL


def check(tensors: list[torch.Tensor], what: str) -> None:
    got, want = total(tensors), reference.total(tensors)
    size = reference.total([t.double().abs() for t in tensors])
    assert isinstance(got, float), type(got)
    assert abs(got - want) <= TOTAL * size, f"{what}: {got!r}, want {want!r} +- {TOTAL * size:g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", ["normal", "lognormal4", "zeros_99", "subnormal"])
def test_equals_the_exact_sum(dtype: str, distribution: str, rng: torch.Generator) -> None:
    for n in (*EDGE_SIZES, pick(rng, LARGE_SIZES)):
        x = draw(distribution, n, DTYPES[dtype], rng)
        x = x[torch.isfinite(x)]  # exp(4 x) may overflow float16
        check([x], f"{dtype} {distribution} n={n}")
        check(cut(x, 5, rng), f"{dtype} {distribution} n={n} in 5 tensors")


def test_many_tensors(rng: torch.Generator) -> None:
    check([], "none")
    check([torch.empty(0)], "empty")
    assert total([]) == 0.0 and total(torch.tensor(2.5)) == 2.5
    check(
        [draw("normal", n % 4, (F32, BF16, F16)[n % 3], rng) for n in range(fewer(10_000))],
        "10,000",
    )


def test_structures(rng: torch.Generator) -> None:
    x = torch.nn.Parameter(torch.ones(2, 3))
    assert total(x) == total([x]) == total({"w": x}) == total((x,)) == 6.0
    array = np.ones((4, 4), np.float16)
    array.flags.writeable = False
    assert total(array) == 16.0
    assert total(x.detach().view(-1)[1:]) == 5.0


def test_infinities_and_nan() -> None:
    inf = math.inf
    assert total(torch.tensor([1.0, inf])) == inf
    assert math.isnan(total(torch.tensor([inf, -inf])))
    assert math.isnan(total([torch.ones(3), torch.tensor([math.nan])]))
    huge = torch.full((10,), 3e38)
    assert total(huge) == reference.total(huge)  # past float32, not past float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count(dtype: str) -> None:
    g = torch.Generator().manual_seed(4)
    x = cut(draw("normal", fewer(2**20 + 3), DTYPES[dtype], g), 11, g)
    kept = [t.clone() for t in x]
    results = set()
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        results.add(total(x).hex())
    assert len(results) == 1, results
    assert_all_bits_equal(x, kept, "input")


def test_flush_denormal_mode_changes_nothing(rng: torch.Generator) -> None:
    for dtype in (F32, BF16, F16):
        x = draw("subnormal_mixed", 5000, dtype, rng)
        want = total(x)
        assert torch.set_flush_denormal(True)
        got = total(x)
        torch.set_flush_denormal(False)
        assert got.hex() == want.hex()


BAD: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "integers": (torch.arange(3), TypeError, ["int64"]),
    "booleans in a list": ([torch.ones(2), torch.ones(2) > 0], TypeError, ["1", "bool"]),
    "not contiguous": (torch.ones(3, 2).t(), ValueError, ["contiguous()"]),
    "numbers": ([1.0], TypeError, ["float"]),
    "nothing": (None, TypeError, ["None"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    tensors, error, words = BAD[name]
    with pytest.raises(error) as caught:
        total(tensors)
    text = str(caught.value)
    assert text.startswith("piece_ops.total: "), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"
