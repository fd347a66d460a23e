"""accumulate_per_sample_squares_: squares of every sample's G_n^T X_n, to float32's rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from piece_ops import _native, reference
from piece_ops.backends import cpu
from piece_ops.functional import accumulate_per_sample_squares_

from helpers.cases import BF16, F16, F32, F64
from helpers.compare import assert_bits_equal, assert_within
from helpers.tolerances import per_sample_squares, per_sample_sums

DTYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "bf16, fp32": (BF16, F32),
    "fp32, fp16": (F32, F16),
}
# out, in, tokens of each sample: register tiles are 4 to 8 by 8 to 48, segments 256 or 512 tokens.
SHAPES: dict[str, tuple[int, int, list[int]]] = {
    "one number": (1, 1, [1]),
    "one token each": (9, 50, [1] * 7),
    "even": (16, 96, [64, 64]),
    "even, with a rest": (40, 72, [70, 70, 70]),
    "odd": (37, 101, [3, 17, 1, 64, 5]),
    "empty samples": (13, 49, [0, 4, 0, 0, 9, 0]),
    "a long sample": (7, 55, [600, 1, 513]),
    "a row": (1, 200, [30, 2]),
    "a column": (200, 1, [30, 2]),
    "several blocks": (210, 60, [5, 6]),
    "many samples": (5, 9, [2] * 100),
    "no tokens": (4, 6, [0, 0]),
    "no samples": (4, 6, []),
    "no features": (0, 6, [3, 2]),
    "no inputs": (4, 0, [3, 2]),
}
INF, NAN = float("inf"), float("nan")


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def matrices(
    shape: tuple[int, int, list[int]], dtypes: tuple[torch.dtype, torch.dtype], g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_output, input and offsets."""
    out, features, lengths = shape
    grad = torch.randn(sum(lengths), out, generator=g).to(dtypes[0])
    return grad, torch.randn(sum(lengths), features, generator=g).to(dtypes[1]), offsets_of(lengths)


def check(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    g: torch.Generator,
    run: Any = accumulate_per_sample_squares_,
) -> None:
    """Squares, sums and both, from accumulators that are not zero, against float64."""
    shape = grad.shape[1], x.shape[1]
    start_squares, start_sums = torch.rand(shape, generator=g), torch.randn(shape, generator=g)
    want_squares, want_sums = start_squares.double(), start_sums.double()
    reference.accumulate_per_sample_squares_(want_squares, grad, x, offsets, want_sums, scales)
    size_squares, size_sums = start_squares.double(), start_sums.double().abs()
    positive = None if scales is None else scales.abs()
    reference.accumulate_per_sample_squares_(
        size_squares, grad.abs(), x.abs(), offsets, size_sums, positive
    )
    tokens = int(offsets.diff().max()) if offsets.numel() > 1 else 0
    samples = offsets.numel() - 1
    kept = grad.clone(), x.clone()
    for has_squares, has_sums in ((True, False), (False, True), (True, True)):
        squares, sums = start_squares.clone(), start_sums.clone()
        given = squares if has_squares else None, sums if has_sums else None
        assert run(given[0], grad, x, offsets, sums=given[1], scales=scales) is None
        if has_squares:
            bound = per_sample_squares(tokens, samples) * size_squares
            assert_within(squares, want_squares, bound, "square_sums")
        if has_sums:
            assert_within(sums, want_sums, per_sample_sums(tokens, samples) * size_sums, "sums")
    assert_bits_equal(grad, kept[0], "grad_output")
    assert_bits_equal(x, kept[1], "input")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_the_reference(shape: str, dtypes: str, rng: torch.Generator) -> None:
    grad, x, offsets = matrices(SHAPES[shape], DTYPES[dtypes], rng)
    scales = torch.randn(offsets.numel() - 1, generator=rng)
    check(grad, x, offsets, None, rng)
    check(grad, x, offsets, scales, rng)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_close_to_the_reference_with_other_instruction_sets(isa: str) -> None:
    if isa not in _native.extension().supported_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, __file__, "-k", "close_to_the_reference and not instruction_sets"],
        env={**os.environ, "PIECE_OPS_ISA": isa},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_one_token_a_sample_is_exact(rng: torch.Generator) -> None:
    """No sum inside a sample: float32 as written, sample after sample."""
    grad, x, offsets = matrices((11, 60, [1] * 5), (F32, F32), rng)
    got, want = torch.zeros(11, 60), torch.zeros(11, 60)
    accumulate_per_sample_squares_(got, grad, x, offsets)
    for n in range(5):
        g = grad[n][:, None] * x[n]
        want += g * g
    assert_bits_equal(got, want)


def test_work_by_column_blocks(rng: torch.Generator) -> None:
    """So many tokens that the packed input is made in parts."""
    check(*matrices((2, 400, [45_000, 7]), (F32, F32), rng), None, rng)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_same_bits_for_every_thread_count_and_transposed(dtypes: str, rng: torch.Generator) -> None:
    grad, x, offsets = matrices((150, 170, [40, 300, 1, 64]), DTYPES[dtypes], rng)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        squares, sums = torch.zeros(150, 170), torch.zeros(150, 170)
        accumulate_per_sample_squares_(squares, grad, x, offsets, sums)
        results.append((squares, sums))
        assert_bits_equal(squares, results[0][0], f"{threads} threads: square_sums")
        assert_bits_equal(sums, results[0][1], f"{threads} threads: sums")
    swapped = torch.zeros(170, 150)
    accumulate_per_sample_squares_(swapped, x, grad, offsets)
    assert_bits_equal(swapped.T.contiguous(), results[0][0], "swapped")


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_tokens_at_any_distance(dtypes: str, rng: torch.Generator) -> None:
    """Columns of a wider matrix, every other row, with an odd offset."""
    grad, x, offsets = matrices((20, 30, [5, 4]), DTYPES[dtypes], rng)
    store = torch.full((2 * len(x) + 1, 91), NAN, dtype=x.dtype)
    store[1::2, 3:23], store[1::2, 31:61] = grad, x
    check(store[1::2, 3:23], store[1::2, 31:61], offsets, None, rng)


def test_batches_of_rows(rng: torch.Generator) -> None:
    """[n, L, features] without offsets: a sample a row; padded tokens have gradient 0."""
    grad, x = torch.randn(4, 6, 10, generator=rng), torch.randn(4, 6, 12, generator=rng)
    grad[1, 3:], grad[2] = 0, 0
    got, want, by_length = (torch.zeros(10, 12) for _ in range(3))
    accumulate_per_sample_squares_(got, grad, x)
    accumulate_per_sample_squares_(want, grad.flatten(0, 1), x.flatten(0, 1), torch.arange(5) * 6)
    assert_bits_equal(got, want)
    real = (
        [grad[n, :m] for n, m in enumerate((6, 3, 0, 6))],
        [x[n, :m] for n, m in enumerate((6, 3, 0, 6))],
    )
    accumulate_per_sample_squares_(
        by_length, torch.cat(real[0]), torch.cat(real[1]), offsets_of([6, 3, 0, 6])
    )
    assert_bits_equal(got, by_length)
    images = torch.zeros(10, 12)
    accumulate_per_sample_squares_(images, grad.view(4, 2, 3, 10), x.view(4, 2, 3, 12))
    assert_bits_equal(images, want)
    rows = torch.zeros(10, 12)
    accumulate_per_sample_squares_(rows, grad[:, 0], x[:, 0])
    accumulate_per_sample_squares_(want.zero_(), grad[:, 0], x[:, 0], torch.arange(5))
    assert_bits_equal(rows, want)


def test_equals_autograd_over_single_samples(rng: torch.Generator) -> None:
    """A batch's mean loss, with scales = samples: the gradients of each sample's own mean."""
    layer = torch.nn.Linear(14, 9, dtype=F64)
    x, target = torch.randn(5, 8, 14, generator=rng), torch.randn(5, 8, 9, generator=rng).double()
    squares, sums = torch.zeros(9, 14, dtype=F64), torch.zeros(9, 14, dtype=F64)
    for n in range(5):
        loss = (layer(x[n].double()) - target[n]).square().mean()
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        squares += gradient**2
        sums += gradient
    output = layer(x.double())
    (grad,) = torch.autograd.grad((output - target).square().mean(), output)
    got_squares, got_sums = torch.zeros(9, 14), torch.zeros(9, 14)
    accumulate_per_sample_squares_(
        got_squares, grad.float(), x, sums=got_sums, scales=torch.full((5,), 5.0)
    )
    size = torch.einsum("nto,nti->noi", grad.abs(), x.abs().double()) * 5
    tokens = 8 + 1  # grad.float() rounds once more
    assert_within(got_squares, squares, per_sample_squares(tokens, 5) * size.square().sum(0))
    assert_within(got_sums, sums, per_sample_sums(tokens, 5) * size.sum(0))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_numbers_that_are_not_finite_add_nothing(
    dtypes: str, bad: float, rng: torch.Generator
) -> None:
    for argument in (0, 1):
        grad, x, offsets = matrices((30, 40, [50, 3]), DTYPES[dtypes], rng)
        factor = (grad, x)[argument]
        factor[52, 7] = factor[0, 0] = bad
        squares, sums = torch.rand(30, 40, generator=rng), torch.rand(30, 40, generator=rng)
        kept = squares.clone(), sums.clone()
        name = ("grad_output", "input")[argument]
        wanted = rf"_squares_: {name} must be finite, got 2 NaN or infinite of {factor.numel()};"
        with pytest.raises(ValueError, match=wanted):
            accumulate_per_sample_squares_(squares, grad, x, offsets, sums)
        assert_bits_equal(squares, kept[0])
        assert_bits_equal(sums, kept[1])
        assert squares._version == 0


def test_products_may_overflow() -> None:
    """Finite factors whose products are not: as float32 arithmetic has it."""
    squares, sums = torch.zeros(1, 2), torch.zeros(1, 2)
    grad, x = torch.tensor([[1e30]]), torch.tensor([[1e30, 1e-5]])
    accumulate_per_sample_squares_(squares, grad, x, torch.tensor([0, 1]), sums)
    assert squares.tolist() == [[INF, INF]] and sums[0, 0] == INF and sums[0, 1] < INF


@pytest.mark.parametrize("at", [(0, 0), (36, 100), (20, 48), (7, 99)])
def test_the_cpu_kernel_tells_of_any_accumulator_that_overflows(
    at: tuple[int, int], rng: torch.Generator
) -> None:
    grad, x, offsets = matrices(SHAPES["odd"], DTYPES["fp32"], rng)
    squares, sums = torch.full((37, 101), 1e30), torch.zeros(37, 101)
    assert not cpu.add_per_sample_squares(squares, grad, x, offsets, sums, None)
    sums[at] = NAN  # whatever made it
    assert cpu.add_per_sample_squares(None, grad, x, offsets, sums, None)
    assert not cpu.add_per_sample_squares(squares, grad, x, offsets, None, None)
    grad[3, at[0]] = x[3, at[1]] = 1e12  # a product is finite, its square is not
    sums.zero_()
    assert not cpu.add_per_sample_squares(None, grad, x, offsets, sums, None)
    assert cpu.add_per_sample_squares(squares, grad, x, offsets, None, None)
    assert not squares[at].isfinite()


def test_flush_denormal_mode_changes_nothing(rng: torch.Generator) -> None:
    grad, x, offsets = matrices((10, 20, [3, 5]), (F32, F32), rng)
    grad = grad * 1e-20
    want, got = torch.zeros(10, 20), torch.zeros(10, 20)
    accumulate_per_sample_squares_(want, grad, x, offsets)
    assert (want > 0).any() and (want < 2.0**-126).all()
    assert torch.set_flush_denormal(True)
    accumulate_per_sample_squares_(got, grad, x, offsets)
    torch.set_flush_denormal(False)
    assert_bits_equal(got, want)


def test_numpy(rng: torch.Generator) -> None:
    grad, x, offsets = matrices((3, 4, [2, 3]), (F32, F32), rng)
    got, want = np.zeros((3, 4), np.float32), torch.zeros(3, 4)
    scales = np.array([1.0, 2.0], np.float32)
    accumulate_per_sample_squares_(got, grad.numpy(), x.numpy(), offsets.numpy(), scales=scales)
    accumulate_per_sample_squares_(want, grad, x, offsets, scales=torch.from_numpy(scales))
    assert_bits_equal(torch.from_numpy(got), want)


Q, G, X, AT = torch.zeros(2, 3), torch.ones(5, 2), torch.ones(5, 3), torch.tensor([0, 2, 5])
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], list[str]]] = {
    "nothing to add to": ((None, G, X, AT), {}, ValueError, ["square_sums or sums", "neither"]),
    "offsets end early": (
        (Q, G, X, AT - AT.new_tensor([0, 0, 1])),
        {},
        ValueError,
        ["5", "0 and 4"],
    ),
    "offsets begin late": ((Q, G, X, AT[1:]), {}, ValueError, ["offsets", "0", "2 and 5"]),
    "offsets decrease": (
        (Q, G, X, torch.tensor([0, 4, 3, 5])),
        {},
        ValueError,
        ["not decrease", "3 after 4 at position 2"],
    ),
    "offsets negative": (
        (Q, G, X, torch.tensor([0, -1, 5])),
        {},
        ValueError,
        ["not decrease", "-1 after 0"],
    ),
    "no offsets": ((Q, G, X, AT[:0]), {}, ValueError, ["offsets", "1-D", "(0,)"]),
    "offsets of two dimensions": ((Q, G, X, AT[None]), {}, ValueError, ["offsets", "(1, 3)"]),
    "offsets int32": ((Q, G, X, AT.int()), {}, TypeError, ["offsets", "int64", "int32"]),
    "other tokens": ((Q, G, X[:4], AT), {}, ValueError, ["leading", "(5, 2)", "(4, 3)"]),
    "transposed": ((Q.T.contiguous(), G, X, AT), {}, ValueError, ["square_sums", "(2, 3)"]),
    "other sums": ((Q, G, X, AT), {"sums": torch.zeros(6)}, ValueError, ["sums", "(2, 3)", "(6,)"]),
    "fp64 accumulator": ((Q.double(), G, X, AT), {}, TypeError, ["square_sums", "float64"]),
    "bf16 sums": ((Q, G, X, AT), {"sums": Q.to(BF16)}, TypeError, ["sums", "bfloat16"]),
    "accumulator not contiguous": (
        (torch.zeros(3, 2).t(), G, X, AT),
        {},
        ValueError,
        ["square_sums", "contiguous"],
    ),
    "fp64 factor": ((Q, G.double(), X, AT), {}, TypeError, ["grad_output", "float64"]),
    "integer factor": ((Q, G, X.int(), AT), {}, TypeError, ["input", "int32"]),
    "features apart": ((Q, torch.ones(2, 5).t(), X, AT), {}, ValueError, ["grad_output", "last"]),
    "one dimension": ((Q, G[0], X[0], AT), {}, ValueError, ["leading dimensions", "(2,)"]),
    "dimensions that do not merge": (
        (Q, torch.ones(2, 9, 2)[:, :4], torch.ones(2, 4, 3)),
        {},
        ValueError,
        ["grad_output", "merge", "contiguous()"],
    ),
    "scales too few": ((Q, G, X, AT), {"scales": torch.ones(1)}, ValueError, ["scales", "(2,)"]),
    "scales fp64": (
        (Q, G, X, AT),
        {"scales": torch.ones(2, dtype=F64)},
        TypeError,
        ["scales", "float32"],
    ),
    "scales NaN": (
        (Q, G, X, AT),
        {"scales": torch.tensor([1.0, NAN])},
        ValueError,
        ["scales", "finite", "nan for sample 1"],
    ),
    "not a tensor": ((Q, "g", X, AT), {}, TypeError, ["grad_output", "str"]),
    "a list": ((Q, [G], X, AT), {}, TypeError, ["grad_output", "list"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    arguments, options, error, words = BAD[name]
    with pytest.raises(error) as caught:
        accumulate_per_sample_squares_(*arguments, **options)
    text = str(caught.value)
    assert text.startswith("piece_ops.accumulate_per_sample_squares_: "), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"
    assert not Q.any()
