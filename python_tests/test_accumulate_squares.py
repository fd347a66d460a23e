"""accumulate_squares_: square_sums += weight * (g * g) and sums += weight * g, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from piece_ops import reference
from piece_ops.functional import accumulate_squares_

from helpers.cases import BF16, EDGE_SIZES, F16, F32, F64, LARGE_SIZES, cut, draw, fewer, pick
from helpers.compare import assert_all_bits_equal, assert_bits_equal, assert_within
from helpers.tolerances import ACCUMULATE_SQUARES, ACCUMULATE_SUMS

GRADS = {"fp32": F32, "bf16": BF16, "fp16": F16}
NAMES = ("gaussian_squared", "normal", "zeros_99", "signed_zeros", "subnormal", "subnormal_mixed")
INF, NAN = float("inf"), float("nan")


def accumulators(grads: list[Tensor], g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [torch.rand(x.shape, generator=g) for x in grads],
        [torch.randn(x.shape, generator=g) for x in grads],
    )


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def check(grads: list[Tensor], weight: float, what: str, g: torch.Generator) -> None:
    """Squares only, sums only and both equal the reference bit for bit; grads are untouched."""
    squares, sums = accumulators(grads, g)
    want_squares, want_sums = clones(squares), clones(sums)
    reference.accumulate_squares_(want_squares, grads, want_sums, weight)
    kept = clones(grads)
    for has_squares, has_sums in ((True, False), (False, True), (True, True)):
        q, s = clones(squares), clones(sums)
        result = accumulate_squares_(
            q if has_squares else None, grads, sums=s if has_sums else None, weight=weight
        )
        assert result is None
        assert_all_bits_equal(q, want_squares if has_squares else squares, f"{what}: square_sums")
        assert_all_bits_equal(s, want_sums if has_sums else sums, f"{what}: sums")
    assert_all_bits_equal(grads, kept, f"{what}: grads")


@pytest.mark.parametrize("dtype", GRADS)
@pytest.mark.parametrize("distribution", NAMES)
def test_equals_the_reference(dtype: str, distribution: str, rng: torch.Generator) -> None:
    for n in (*EDGE_SIZES, pick(rng, LARGE_SIZES)):
        weight = pick(rng, (1.0, 0.25, 1 / 3, 3.0))
        grads = [draw(distribution, n, GRADS[dtype], rng)]
        check(grads, weight, f"{dtype} {distribution} n={n} weight={weight}", rng)


@pytest.mark.parametrize("pieces", [1, 2, 17, 300])
def test_many_tensors_of_mixed_dtypes(pieces: int, rng: torch.Generator) -> None:
    parts = [
        p.to(pick(rng, (F32, BF16, F16))) for p in cut(draw("normal", 7001, F32, rng), pieces, rng)
    ]
    check(parts, 0.5, f"{pieces} tensors", rng)
    check(
        [draw("normal", n % 4, BF16, rng) for n in range(fewer(10_000))], 1.0, "10,000 tensors", rng
    )


def test_nothing_to_do(rng: torch.Generator) -> None:
    check([], 1.0, "no tensor", rng)
    check([torch.empty(0), torch.empty(3, 0)], 1.0, "empty tensors", rng)
    check([torch.tensor(3.0), torch.empty(0), torch.tensor(2.0, dtype=BF16)], 1.0, "0-dim", rng)


def test_squares_may_overflow(rng: torch.Generator) -> None:
    """A finite gradient whose square is not: the accumulator becomes inf, as the formula says."""
    check([torch.tensor([1e30, -3e38, 1e-30])], 1.0, "overflow", rng)


def test_close_to_exact_arithmetic(rng: torch.Generator) -> None:
    g, weight = draw("normal", 10_000, F32, rng), 1 / 3
    squares, sums = torch.rand(10_000, generator=rng), torch.randn(10_000, generator=rng)
    exact_q = squares.double() + weight * g.double() ** 2
    exact_s = sums.double() + weight * g.double()
    size_s = sums.double().abs() + abs(weight) * g.double().abs()
    accumulate_squares_(squares, g, sums=sums, weight=weight)
    assert_within(squares, exact_q, ACCUMULATE_SQUARES * exact_q, "square_sums")
    assert_within(sums, exact_s, ACCUMULATE_SUMS * size_s, "sums")


@pytest.mark.parametrize("dtype", GRADS)
def test_same_bits_for_every_thread_count(dtype: str) -> None:
    g = torch.Generator().manual_seed(3)
    parts = cut(draw("normal", fewer(2**20 + 3), GRADS[dtype], g), 9, g)
    want, _ = accumulators(parts, g)
    start = clones(want)
    reference.accumulate_squares_(want, parts, None, 0.1)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        got = clones(start)
        accumulate_squares_(got, parts, weight=0.1)
        assert_all_bits_equal(got, want, f"{threads} threads")


def test_flush_denormal_mode_changes_nothing(rng: torch.Generator) -> None:
    for dtype in GRADS.values():
        grads = [draw("subnormal_mixed", 5000, dtype, rng), draw("subnormal", 5000, dtype, rng)]
        squares = [draw("subnormal", 5000, F32, rng).abs() for _ in grads]
        sums = [draw("subnormal", 5000, F32, rng) for _ in grads]
        want_squares, want_sums = clones(squares), clones(sums)
        reference.accumulate_squares_(want_squares, grads, want_sums, 0.75)
        assert torch.set_flush_denormal(True)
        accumulate_squares_(squares, grads, sums=sums, weight=0.75)
        torch.set_flush_denormal(False)
        assert_all_bits_equal(squares, want_squares, "square_sums")
        assert_all_bits_equal(sums, want_sums, "sums")


@pytest.mark.parametrize("dtype", GRADS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_gradient_that_is_not_finite_adds_nothing(
    dtype: str, bad: float, rng: torch.Generator
) -> None:
    for n, at in ((5, 0), (5, 4), (1025, 1024), (200_001, 99_999)):
        grads = [draw("normal", m, GRADS[dtype], rng) for m in (100, n, 300)]
        grads[1][at] = bad
        grads[1][n // 2] = bad
        squares, sums = accumulators(grads, rng)
        kept = clones([*squares, *sums])
        count = 1 if at == n // 2 else 2
        wanted = rf"piece_ops\.accumulate_squares_: grads\[1\] .*finite.*got {count} "
        with pytest.raises(ValueError, match=wanted):
            accumulate_squares_(squares, grads, sums=sums)
        assert_all_bits_equal([*squares, *sums], kept, "accumulators")


def test_the_tensor_with_a_bad_gradient_is_named(rng: torch.Generator) -> None:
    grads = {"lm_head.weight": torch.ones(3), "norm.bias": torch.tensor([1.0, NAN, INF])}
    squares = {key: torch.zeros(3) for key in grads}
    with pytest.raises(ValueError, match=r"'norm\.bias'.* got 2 "):
        accumulate_squares_(squares, grads)
    assert_bits_equal(squares["lm_head.weight"], torch.zeros(3))


def test_structures_and_numpy(rng: torch.Generator) -> None:
    g = torch.randn(3, 4, generator=rng)
    square = torch.zeros(3, 4)
    accumulate_squares_(square, g)
    assert_bits_equal(square, g * g)
    by_name = {"b": torch.zeros(3, 4), "a": torch.zeros(3, 4)}
    accumulate_squares_(by_name, {"a": 2 * g, "b": g})  # matched by name, not by order
    assert_all_bits_equal(by_name, {"b": g * g, "a": 4 * (g * g)})
    array, sums = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    accumulate_squares_(array, g.numpy(), sums=sums, weight=2.0)
    assert_bits_equal(torch.from_numpy(array), 2 * (g * g))
    assert_bits_equal(torch.from_numpy(sums), 2 * g)


def test_views_with_an_offset_work(rng: torch.Generator) -> None:
    base, store = torch.randn(1003, generator=rng).to(BF16), torch.zeros(1004)
    accumulate_squares_(store[3:], base[2:])
    want = torch.zeros(1004)
    reference.accumulate_squares_(want[3:], base[2:])
    assert_bits_equal(store, want)


def read_only(shape: tuple[int, ...]) -> Any:
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return array


G = torch.ones(2, 3)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], list[str]]] = {
    "nothing to add to": ((None, G), {}, ValueError, ["square_sums", "sums"]),
    "other size": ((torch.zeros(5), G), {}, ValueError, ["square_sums", "5", "6"]),
    "other size of sums": (
        (torch.zeros(2, 3), G),
        {"sums": torch.zeros(7)},
        ValueError,
        ["sums", "7", "6"],
    ),
    "fewer tensors": (([torch.zeros(2, 3)], [G, G]), {}, ValueError, ["square_sums", "1", "2"]),
    "a name missing": (({"a": G.clone()}, {"b": G}), {}, ValueError, ["square_sums", "'a'"]),
    "another structure": (([G.clone()], {"b": G}), {}, TypeError, ["square_sums", "dict"]),
    "bf16 accumulator": (
        (torch.zeros(2, 3, dtype=BF16), G),
        {},
        TypeError,
        ["float32", "bfloat16"],
    ),
    "fp64 accumulator": ((torch.zeros(2, 3, dtype=F64), G), {}, TypeError, ["float32", "float64"]),
    "fp64 sums": (
        (torch.zeros(2, 3), G),
        {"sums": torch.zeros(2, 3, dtype=F64)},
        TypeError,
        ["sums", "float64"],
    ),
    "fp64 gradient": ((torch.zeros(2, 3), G.double()), {}, TypeError, ["grads", "float64"]),
    "integer gradient": ((torch.zeros(2, 3), G.int()), {}, TypeError, ["grads", "int32"]),
    "not a tensor": ((torch.zeros(2, 3), "g"), {}, TypeError, ["grads", "str"]),
    "accumulator not contiguous": (
        (torch.zeros(3, 2).t(), G),
        {},
        ValueError,
        ["square_sums", "contiguous"],
    ),
    "gradient not contiguous": (
        (torch.zeros(3, 2), G.t()),
        {},
        ValueError,
        ["grads", "contiguous()"],
    ),
    "read-only": ((read_only((2, 3)), G.numpy()), {}, ValueError, ["square_sums", "read-only"]),
    "weight NaN": ((torch.zeros(2, 3), G), {"weight": NAN}, ValueError, ["weight", "nan"]),
    "weight 0": ((torch.zeros(2, 3), G), {"weight": 0.0}, ValueError, ["weight", "0.0"]),
    "weight negative": ((torch.zeros(2, 3), G), {"weight": -1.0}, ValueError, ["weight", "-1.0"]),
    "weight infinite": ((torch.zeros(2, 3), G), {"weight": INF}, ValueError, ["weight", "inf"]),
    "weight a string": ((torch.zeros(2, 3), G), {"weight": "1"}, TypeError, ["weight", "str"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    arguments, options, error, words = BAD[name]
    with pytest.raises(error) as caught:
        accumulate_squares_(*arguments, **options)
    text = str(caught.value)
    assert text.startswith("piece_ops.accumulate_squares_: "), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"
