"""scatter_: target[indices[s]] = values[s] over many tensors; nothing else is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from piece_ops import reference
from piece_ops.functional import scatter_

from helpers.cases import BF16, DTYPES, EDGE_SIZES, F16, F32, draw, fewer, some_positions
from helpers.compare import assert_all_bits_equal, assert_bits_equal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True], ids=["from_fp32", "own_dtype"])
@pytest.mark.parametrize("distribution", ["normal", "lognormal4", "infinities", "subnormal_mixed"])
def test_equals_the_reference(
    dtype: str, own: bool, distribution: str, rng: torch.Generator
) -> None:
    """Values come in the target's dtype or in float32 (rounded); the rest keeps its bits."""
    if dtype == "fp64" and not own:
        pytest.skip("float64 targets take float64 values")
    for share in (0.0, 0.01, 0.5, 1.0):
        targets = [draw("with_nan_inf", n, DTYPES[dtype], rng) for n in (*EDGE_SIZES, 70_001)]
        want = [t.clone() for t in targets]
        indices = [some_positions(t.numel(), share, rng) for t in targets]
        kind = DTYPES[dtype] if own else F32
        values = [draw(distribution, i.numel(), kind, rng) for i in indices]
        kept = [v.clone() for v in values]
        assert scatter_(targets, indices, values) is None
        reference.scatter_(want, indices, values)
        assert_all_bits_equal(targets, want, f"share {share}")
        assert_all_bits_equal(values, kept, "values")


def test_nan_stays_nan() -> None:
    """Rounding must not carry a NaN's payload into infinity (0x7f80ffff -> 0x7f81, not 0x7f80)."""
    patterns = np.array([0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32)
    values = torch.from_numpy(patterns.view(np.float32).copy())
    for dtype in (BF16, F16, F32):
        target = torch.zeros(5, dtype=dtype)
        scatter_(target, torch.arange(5), values)
        assert bool(target.isnan().all()), f"{dtype}: {target}"


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_of_every_upper_half(dtype: torch.dtype) -> None:
    """To nearest, ties to even: all 2^16 upper halves of a float32 with telling lower halves."""
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    halves = (0x0000, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    patterns = np.concatenate([upper | np.uint32(lower) for lower in halves])
    values = torch.from_numpy(patterns.view(np.float32).copy())
    values = values[~values.isnan()]
    target = torch.zeros(values.numel(), dtype=dtype)
    scatter_(target, torch.arange(values.numel()), values)
    assert_bits_equal(target, values.to(dtype))


def test_gather_then_scatter_is_nothing(rng: torch.Generator) -> None:
    from piece_ops.functional import gather

    for dtype in (F32, BF16, F16):
        target = draw("infinities", 5000, dtype, rng)
        before, index = target.clone(), some_positions(5000, 0.3, rng)
        scatter_(target, index, gather(target, index, dtype=F32))
        assert_bits_equal(target, before)


def test_many_tensors(rng: torch.Generator) -> None:
    for count in (0, 1, 300, fewer(10_000)):
        targets = [draw("normal", n % 4, (F32, BF16, F16)[n % 3], rng) for n in range(count)]
        want = [t.clone() for t in targets]
        indices = [some_positions(t.numel(), 0.5, rng) for t in targets]
        values = [torch.randn(i.numel(), generator=rng) for i in indices]
        scatter_(targets, indices, values)
        reference.scatter_(want, indices, values)
        assert_all_bits_equal(targets, want, f"{count} tensors")


def test_same_bits_for_every_thread_count() -> None:
    g = torch.Generator().manual_seed(2)
    start = [draw("normal", n, BF16, g) for n in (fewer(2**20 + 3), 17, fewer(2**18))]
    indices = [some_positions(s.numel(), 0.4, g) for s in start]
    values = [torch.randn(i.numel(), generator=g) for i in indices]
    want = [t.clone() for t in start]
    reference.scatter_(want, indices, values)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        got = [t.clone() for t in start]
        scatter_(got, indices, values)
        assert_all_bits_equal(got, want, f"{threads} threads")


def test_flush_denormal_mode_changes_nothing(rng: torch.Generator) -> None:
    for dtype in (F32, BF16, F16):
        got, values = torch.zeros(3000, dtype=dtype), draw("subnormal_mixed", 3000, F32, rng)
        want = values.to(dtype)
        assert torch.set_flush_denormal(True)
        scatter_(got, torch.arange(3000), values)
        torch.set_flush_denormal(False)
        assert_bits_equal(got, want, str(dtype))


def test_structures(rng: torch.Generator) -> None:
    """Any rank, 0-dim, a leaf that requires grad, a view with an offset, by name, NumPy."""
    target = torch.zeros(3, 4)
    scatter_(target, torch.tensor([0, 11]), torch.tensor([1.0, 2.0]))
    assert target.flatten().tolist() == [1.0, *[0.0] * 10, 2.0]
    leaf = torch.nn.Parameter(torch.zeros(2, 2, dtype=BF16))
    scatter_({"w": leaf}, {"w": torch.tensor([3])}, {"w": torch.nn.Parameter(torch.ones(1))})
    assert leaf.detach().flatten().tolist() == [0.0, 0.0, 0.0, 1.0] and leaf.requires_grad
    scalar = torch.tensor(0.0)
    scatter_(
        [scalar, target.view(-1)[5:]],
        [torch.tensor([0]), torch.tensor([0])],
        [
            torch.tensor([4.0]),
            torch.tensor([7.0]),
        ],
    )
    assert float(scalar) == 4.0 and float(target.flatten()[5]) == 7.0
    array = np.zeros(3, np.float32)
    scatter_(array, np.array([2]), np.array([5.0], np.float32))
    assert array.tolist() == [0.0, 0.0, 5.0]


def read_only() -> Any:
    array = np.zeros(6, np.float32)
    array.flags.writeable = False
    return array


def target() -> torch.Tensor:
    return torch.zeros(2, 3)


INDEX, V = torch.tensor([0, 5]), torch.ones(2)
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], list[str]]] = {
    "past the end": ((target(), torch.tensor([0, 6]), V), ValueError, ["indices", "6"]),
    "negative": ((target(), torch.tensor([-1, 2]), V), ValueError, ["indices", "-1"]),
    "unsorted": ((target(), torch.tensor([3, 2]), V), ValueError, ["indices", "increasing"]),
    "twice": ((target(), torch.tensor([3, 3]), V), ValueError, ["indices", "increasing"]),
    "int32": ((target(), INDEX.int(), V), TypeError, ["int64", "int32"]),
    "fewer": (([target(), target()], [INDEX, INDEX], [V]), ValueError, ["values", "1", "2"]),
    "values too long": ((target(), INDEX, torch.ones(3)), ValueError, ["values", "2", "3"]),
    "values of another dtype": ((target(), INDEX, V.to(BF16)), TypeError, ["values", "bfloat16"]),
    "values of float64": ((target(), INDEX, V.double()), TypeError, ["values", "float64"]),
    "integers": ((target().int(), INDEX, V), TypeError, ["targets", "int32"]),
    "not contiguous": ((target().t(), INDEX, V), ValueError, ["targets", "contiguous"]),
    "values not contiguous": (
        (target(), INDEX, torch.ones(4)[::2]),
        ValueError,
        ["values", "contiguous()"],
    ),
    "read-only": ((read_only(), INDEX.numpy(), V.numpy()), ValueError, ["targets", "read-only"]),
    "expanded": ((torch.zeros(1).expand(6), INDEX, V), ValueError, ["targets", "contiguous"]),
    "not a tensor": ((3.0, INDEX, V), TypeError, ["targets", "float"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    """A clear message, and nothing is written."""
    arguments, error, words = BAD[name]
    with pytest.raises(error) as caught:
        scatter_(*arguments)
    text = str(caught.value)
    assert text.startswith("piece_ops.scatter_: "), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"
    written = arguments[0] if isinstance(arguments[0], list) else [arguments[0]]
    assert all(not np.asarray(t).any() for t in written if not isinstance(t, float))
