"""sampled_weight_grad: chosen entries of grad_output^T input, in one fixed order of additions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from piece_ops import reference
from piece_ops.functional import sampled_weight_grad

from helpers.cases import BF16, F16, F32, draw, fewer, pick, some, some_positions
from helpers.compare import assert_bits_equal, assert_within
from helpers.sampled_order import sampled_weight_grad as in_order
from helpers.tolerances import SAMPLED_WEIGHT_GRAD

HALVES_AND_FLOAT = (F32, BF16, F16)
# Vectors of 4, 8 and 16, lanes of 32, blocks of 256 tokens: one off each.
TOKENS = (0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 600)
# Vectors of 8 and 16, tiles of 16 and 32 columns: one off; several of each in rows of 16 bytes.
FEATURES = (1, 3, 8, 15, 16, 17, 33, 130, 264, 300)


def matrix(
    tokens: int, features: int, dtype: torch.dtype, g: torch.Generator, kind: str = "normal"
) -> Tensor:
    """Some are slices of a wider matrix: at an odd offset, or in rows that begin at 16 bytes."""
    padded = (features + 15) // 8 * 8
    ways = ((0, features), (0, features), (1, features + 2), (5, features + 10), (8, padded))
    before, width = pick(g, ways)
    return draw(kind, tokens * width, dtype, g).view(tokens, width)[:, before : before + features]


def check(grad_output: Tensor, x: Tensor, indices: Tensor, what: str) -> None:
    got = sampled_weight_grad(grad_output, x, indices)
    assert_bits_equal(got, in_order(grad_output, x, indices), what)
    size = reference.sampled_weight_grad(grad_output.abs(), x.abs(), indices)
    want = reference.sampled_weight_grad(grad_output, x, indices)
    assert_within(got, want, SAMPLED_WEIGHT_GRAD * size, what)


@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_reference(tokens: int, rng: torch.Generator) -> None:
    for out, width in some(itertools.product(FEATURES, FEATURES), f"{tokens}"):
        g, x = (matrix(tokens, n, pick(rng, HALVES_AND_FLOAT), rng) for n in (out, width))
        kept = g.clone(), x.clone()
        share = pick(rng, (0.0, 0.003, 0.05, 0.5, 1.0))
        indices = some_positions(out * width, share, rng)
        check(g, x, indices, f"{out} x {width}, {indices.numel()} indices, {g.dtype} {x.dtype}")
        assert_bits_equal(g.contiguous(), kept[0], "grad_output")
        assert_bits_equal(x.contiguous(), kept[1], "input")


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_selections_as_they_are(dtype: torch.dtype, rng: torch.Generator) -> None:
    """A few rows or columns hold most, runs, one of each; more rows than a thread takes at once."""
    tokens, out, width = 300, 700, 90
    g, x = matrix(tokens, out, dtype, rng), matrix(tokens, width, dtype, rng)
    rare = torch.rand(out, width, generator=rng) < 0.01
    rows, columns = rare.clone(), rare.clone()
    rows[[3, 350, 699]] = True
    columns[:, [0, 88]] = True
    masks = {
        "full rows": rows,
        "full columns": columns,
        "the first": torch.arange(out * width) == 0,
        "the last": torch.arange(out * width) == out * width - 1,
        "a run": (torch.arange(out * width) - 30_000).abs() < 2000,
        "all": torch.ones(out * width),
    }
    for name, mask in some(masks.items(), str(dtype)):
        check(g, x, mask.flatten().nonzero().flatten(), f"{name}, {dtype}")


@pytest.mark.parametrize("kind", ["zeros_99", "signed_zeros", "subnormal_mixed"])
def test_bits_of_special_numbers(kind: str, rng: torch.Generator) -> None:
    for dtype in HALVES_AND_FLOAT:
        g, x = matrix(270, 40, dtype, rng, kind), matrix(270, 50, dtype, rng)
        for indices in (some_positions(2000, 0.3, rng), some_positions(2000, 0.015, rng)):
            assert_bits_equal(sampled_weight_grad(g, x, indices), in_order(g, x, indices), kind)


def test_one_token_whose_rows_have_no_stride(rng: torch.Generator) -> None:
    g, x = (torch.randn(n, generator=rng).as_strided((1, n), (0, 1)) for n in (40, 64))
    for indices in (some_positions(2560, 0.015, rng), some_positions(2560, 0.3, rng)):
        check(g, x, indices, f"{indices.numel()} indices")


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_few_indices_and_one_more(dtype: torch.dtype, rng: torch.Generator) -> None:
    """Up to some half as many as both matrices have columns, the CPU reads rows as they are."""
    for out, width in ((40, 64), (41, 64), (40, 63), (2, 2), (300, 500)):
        g, x = matrix(300, out, dtype, rng), matrix(300, width, dtype, rng)
        limit = (out + width) // 2
        for n in (1, limit // 2, limit, 2 * limit):
            indices = torch.randperm(out * width - 1, generator=rng)[: n - 1].sort().values
            indices = torch.cat([indices, torch.tensor([out * width - 1])])
            check(g, x, indices, f"{out} x {width}, {indices.numel()} indices, {dtype}")


def test_nan_and_infinities_are_arithmetic(rng: torch.Generator) -> None:
    g, x = matrix(300, 20, F32, rng, "with_nan_inf"), matrix(300, 30, BF16, rng)
    g[:, ::2] = 1.0
    x[7, 3], x[8, 4], x[270, 5] = float("inf"), -float("inf"), float("nan")
    indices = torch.arange(600)
    got, want = sampled_weight_grad(g, x, indices), in_order(g, x, indices)
    assert torch.equal(got.isnan(), want.isnan())
    assert_bits_equal(got.nan_to_num(0.0, 1.0, -1.0), want.nan_to_num(0.0, 1.0, -1.0))
    assert got[3] == float("inf") and got[4] == -float("inf") and got[5].isnan()
    for few in (indices[3:6], torch.arange(0, 600, 40)):
        assert sampled_weight_grad(g, x.float(), few).tolist() == pytest.approx(
            want[few].tolist(), rel=0, abs=0, nan_ok=True
        )


def test_overflow_is_float32s() -> None:
    g, x = torch.full((64, 2), 3e38), torch.full((64, 2), 2.0)
    assert sampled_weight_grad(g, x, torch.tensor([1])).tolist() == [float("inf")]


def test_same_bits_for_every_thread_count(rng: torch.Generator) -> None:
    kinds = ((900, 200, 0.01, F32), (40, 3000, 0.2, F32), (900, 200, 0.002, BF16))
    cases = []
    for out, width, share, dtype in kinds:
        g, x = matrix(520, fewer(out), BF16, rng), matrix(520, fewer(width), dtype, rng)
        indices = some_positions(g.shape[1] * x.shape[1], share, rng)
        cases.append((g, x, indices, in_order(g, x, indices)))
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        for g, x, indices, want in cases:
            assert_bits_equal(sampled_weight_grad(g, x, indices), want, f"{threads} threads")


def test_bits_do_not_depend_on_the_company(rng: torch.Generator) -> None:
    """An entry has the same bits whichever others are asked for, and in compacted columns."""
    g, x = matrix(400, 50, F32, rng), matrix(400, 60, F32, rng)
    everything = sampled_weight_grad(g, x, torch.arange(3000))
    indices = some_positions(3000, 0.02, rng)
    assert_bits_equal(sampled_weight_grad(g, x, indices), everything[indices])
    i, j = indices // 60, indices % 60
    used, slot = j.unique(return_inverse=True)
    compact = sampled_weight_grad(g, x[:, used], i * used.numel() + slot)
    assert_bits_equal(compact, everything[indices])


def test_the_matrices_play_the_same_part(rng: torch.Generator) -> None:
    """A weight stored as [in, out]: input first."""
    g, x = matrix(300, 20, BF16, rng), matrix(300, 30, F32, rng)
    as_linear = sampled_weight_grad(g, x, torch.arange(600)).view(20, 30)
    as_conv1d = sampled_weight_grad(x, g, torch.arange(600)).view(30, 20)
    assert_bits_equal(as_conv1d, as_linear.t().contiguous())


def test_equals_autograd(rng: torch.Generator) -> None:
    layer = torch.nn.Linear(24, 40, dtype=torch.float64)
    x = torch.randn(3, 70, 24, generator=rng, dtype=torch.float64)
    y = layer(x)
    g = torch.randn(y.shape, generator=rng, dtype=torch.float64)
    y.backward(g)
    indices = some_positions(960, 0.1, rng)
    assert layer.weight.grad is not None
    got = sampled_weight_grad(g.float(), x.float(), indices)
    size = reference.sampled_weight_grad(g.abs(), x.abs(), indices)
    # The inputs are rounded here, which costs a product two more roundings.
    bound = (SAMPLED_WEIGHT_GRAD + 2 * 2.0**-24) * size
    assert_within(got, layer.weight.grad.flatten()[indices], bound)


def test_flush_denormal_mode_changes_nothing(rng: torch.Generator) -> None:
    g, x = matrix(100, 9, F32, rng, "subnormal_mixed"), matrix(100, 11, F32, rng)
    want = in_order(g, x, torch.arange(99))
    assert torch.set_flush_denormal(True)
    got = sampled_weight_grad(g, x, torch.arange(99))
    torch.set_flush_denormal(False)
    assert_bits_equal(got, want)


def test_forms(rng: torch.Generator) -> None:
    """Leading dimensions, slices of a fused projection, one token, NumPy, leaves, nothing."""
    fused = torch.randn(2, 5, 12, generator=rng)
    g, x = fused[..., 4:8], torch.randn(2, 5, 3, generator=rng).requires_grad_()
    indices = torch.tensor([0, 5, 11])
    want = in_order(g.reshape(10, 4), x.reshape(10, 3), indices)
    got = sampled_weight_grad(g, x, indices)
    assert_bits_equal(got, want)
    assert not got.requires_grad
    assert sampled_weight_grad(g[0, 0], x[0, 0], indices[:1]).shape == (1,)
    array = sampled_weight_grad(g.numpy().copy(), x.detach().numpy(), indices.numpy())
    assert isinstance(array, np.ndarray) and array.tolist() == got.tolist()
    none = torch.empty(0, dtype=torch.int64)
    assert sampled_weight_grad(g, x, none).shape == (0,)
    assert sampled_weight_grad(g[:0], x[:0], indices).tolist() == [0.0, 0.0, 0.0]
    assert sampled_weight_grad(g[..., :0], x, none).shape == (0,)


G, X = torch.ones(4, 3), torch.ones(4, 5)
I = torch.tensor([0, 14])  # noqa: E741 - the positions, as in the formula
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], list[str]]] = {
    "past the end": ((G, X, torch.tensor([0, 15])), ValueError, ["indices must", "0..14", "15"]),
    "negative": ((G, X, torch.tensor([-1, 2])), ValueError, ["indices must", "-1"]),
    "unsorted": ((G, X, torch.tensor([3, 2])), ValueError, ["indices must", "increasing"]),
    "twice": ((G, X, torch.tensor([3, 3])), ValueError, ["indices", "increasing", "slot 1"]),
    "of an empty weight": ((G[:, :0], X, torch.tensor([0])), ValueError, ["indices", "0"]),
    "int32": ((G, X, I.int()), TypeError, ["indices", "int64", "int32"]),
    "indices not flat": ((G, X, I.view(1, 2)), ValueError, ["indices", "flat"]),
    "tokens": ((G, X[:3], I), ValueError, ["input", "4 tokens", "3"]),
    "leading dimensions": ((G.view(2, 2, 3), X[:2], I), ValueError, ["input", "4 tokens", "2"]),
    "float64": ((G.double(), X, I), TypeError, ["grad_output", "float64"]),
    "integers": ((G, X.int(), I), TypeError, ["input", "int32"]),
    "columns apart": ((G, X.t().contiguous().t(), I), ValueError, ["input", "contiguous()"]),
    "every other column": ((torch.ones(4, 6)[:, ::2], X, I), ValueError, ["grad_output"]),
    "expanded": ((torch.ones(1, 3).expand(4, 3), X, I), ValueError, ["grad_output", "overlap"]),
    "no view": (
        (torch.ones(2, 4, 3).transpose(0, 1), torch.ones(8, 5), I),
        ValueError,
        ["grad_output", "contiguous()"],
    ),
    "a scalar": ((torch.tensor(1.0), X, I), ValueError, ["grad_output", "scalar"]),
    "a list": (([G], X, I), TypeError, ["grad_output", "list"]),
    "devices": ((G, X.to("meta"), I), ValueError, ["device", "meta"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    arguments, error, words = BAD[name]
    with pytest.raises(error) as caught:
        sampled_weight_grad(*arguments)
    text = str(caught.value)
    assert text.startswith("piece_ops.sampled_weight_grad: "), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"
