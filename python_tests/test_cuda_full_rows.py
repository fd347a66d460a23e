"""Sampled weight gradients on CUDA: rows so full that a matrix product computes them whole."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from piece_ops.backends import cuda, cuda_full_rows

from helpers.cases import BF16, F32
from helpers.compare import assert_bits_equal, assert_within
from helpers.emulated import build, emulation, load
from helpers.tolerances import sum_of_products

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
)

OPS = torch.ops.piece_ops


@pytest.fixture(scope="module")
def emulated() -> Iterator[Any]:
    with emulation(load(build("plain"))) as runtime:
        yield runtime


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", ["some rows", "all rows", "no other index"])
def test_sampled_weight_grad_of_full_rows(
    emulated: Any, kind: str, dtype: torch.dtype, rng: torch.Generator, monkeypatch: Any
) -> None:
    """Full rows by products, in parts, to float32's rounding; the others with the same bits."""
    out, width, tokens = 90, 200, 300
    wanted = torch.rand(out, width, generator=rng) < (0.3 if kind == "all rows" else 1e-3)
    if kind != "all rows":
        wanted[10:40:3] = torch.rand(10, width, generator=rng) < 0.4
    if kind == "no other index":
        wanted[[row for row in range(out) if row not in range(10, 40, 3)]] = False
    share = 0.05  # of 200 columns: 10, which no other row has
    is_full = wanted.sum(1) >= share * width
    assert int(is_full.sum()) == (out if kind == "all rows" else 10)
    indices = wanted.view(-1).nonzero().view(-1)
    of_full = is_full[indices // width]
    assert bool(of_full.all()) == (kind != "some rows")
    monkeypatch.setattr(cuda_full_rows, "SHARE", {2: share, 4: share})
    monkeypatch.setattr(cuda_full_rows, "LEAST", 100)
    monkeypatch.setattr(cuda_full_rows, "SCRATCH_BYTES", 4 * (4 * width + tokens * 4))
    parts: list[int] = []
    product = cuda_full_rows._product
    monkeypatch.setattr(
        cuda_full_rows, "_product", lambda g, x: parts.append(g.shape[1]) or product(g, x)
    )
    g = torch.randn(tokens, out + 3, generator=rng).to(dtype)[:, :out]
    x = torch.randn(tokens, width, generator=rng).to(dtype)
    got = cuda.sampled_weight_grad(g, x, indices)
    assert sum(parts) == int(is_full.sum()) and 1 < len(parts) and max(parts) < out
    i, j = indices // width, indices % width
    left, right = g[:, i].double(), x[:, j].double()
    size = (left * right).abs().sum(0)
    assert_within(got, (left * right).sum(0), sum_of_products(tokens) * size)
    one_by_one = OPS.sampled_weight_grad(g, x, indices)
    assert_bits_equal(got[~of_full], one_by_one[~of_full])
    # The plan stays with the indices until they are written.
    splits = []
    split = cuda_full_rows.split
    monkeypatch.setattr(cuda_full_rows, "split", lambda *a: splits.append(1) or split(*a))
    assert_bits_equal(cuda.sampled_weight_grad(g, x, indices), got)
    assert not splits
    indices.copy_(indices.clone())
    assert_bits_equal(cuda.sampled_weight_grad(g, x, indices), got)
    assert splits == [1]
    held = len(cuda_full_rows._plans)
    del indices
    assert len(cuda_full_rows._plans) == held - 1


def test_few_full_rows_are_not_worth_a_product(emulated: Any, rng: torch.Generator) -> None:
    indices = torch.arange(cuda_full_rows.LEAST - 1)
    g, x = torch.randn(20, 70, generator=rng), torch.randn(20, 60, generator=rng)
    got = cuda.sampled_weight_grad(g, x, indices)
    assert_bits_equal(got, OPS.sampled_weight_grad(g, x, indices))
