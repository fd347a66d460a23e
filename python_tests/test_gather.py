"""gather: values[s] = source[indices[s]] over many tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from piece_ops import reference
from piece_ops.functional import gather

from helpers.cases import BF16, DTYPES, EDGE_SIZES, F16, F32, draw, fewer, some_positions
from helpers.compare import assert_all_bits_equal, assert_bits_equal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", ["normal", "with_nan_inf", "subnormal", "signed_zeros"])
def test_equals_the_reference(dtype: str, distribution: str, rng: torch.Generator) -> None:
    sources = [draw(distribution, n, DTYPES[dtype], rng) for n in (*EDGE_SIZES, 70_001)]
    kept = [s.clone() for s in sources]
    for share in (0.0, 0.01, 0.5, 1.0):
        indices = [some_positions(s.numel(), share, rng) for s in sources]
        got = gather(sources, indices)
        assert_all_bits_equal(got, reference.gather(sources, indices), f"share {share}")
        if dtype != "fp64":
            want = reference.gather(sources, indices, torch.float32)
            got = gather(sources, indices, dtype=torch.float32)
            assert_all_bits_equal(
                [torch.nan_to_num(t) for t in got],
                [torch.nan_to_num(t) for t in want],
                "as float32",
            )
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g.isnan(), w.isnan())
    assert_all_bits_equal(sources, kept, "sources")


def test_mixed_dtypes_and_many_tensors(rng: torch.Generator) -> None:
    for count in (0, 1, 300, fewer(10_000)):
        sources = [draw("normal", n % 4, (F32, BF16, F16)[n % 3], rng) for n in range(count)]
        indices = [some_positions(s.numel(), 0.5, rng) for s in sources]
        assert_all_bits_equal(gather(sources, indices), reference.gather(sources, indices))


def test_same_bits_for_every_thread_count() -> None:
    g = torch.Generator().manual_seed(2)
    sources = [draw("normal", n, BF16, g) for n in (fewer(2**20 + 3), 17, fewer(2**18))]
    indices = [some_positions(s.numel(), 0.4, g) for s in sources]
    want = reference.gather(sources, indices)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        assert_all_bits_equal(gather(sources, indices), want, f"{threads} threads")


def test_flush_denormal_mode_changes_nothing(rng: torch.Generator) -> None:
    for dtype in (F32, BF16, F16):
        source, index = draw("subnormal_mixed", 3000, dtype, rng), torch.arange(0, 3000, 2)
        want = reference.gather(source, index, torch.float32)
        assert torch.set_flush_denormal(True)
        got = gather(source, index, dtype=torch.float32)
        torch.set_flush_denormal(False)
        assert_bits_equal(got, want, str(dtype))


def test_structures(rng: torch.Generator) -> None:
    """Any rank, 0-dim, a leaf that requires grad, a view, a dict by name, NumPy (read-only too)."""
    base = torch.randn(3, 4, generator=rng)
    index = torch.tensor([0, 5, 11])
    assert_bits_equal(gather(base, index), base.flatten()[index])
    assert gather(torch.tensor(2.5), torch.tensor([0])).tolist() == [2.5]
    assert not gather(torch.nn.Parameter(base), index).requires_grad
    assert_bits_equal(gather(base.view(-1)[1:], torch.tensor([10])), base.flatten()[11:])
    got = gather({"b": base, "a": 2 * base}, {"a": index, "b": index[:1]})
    assert list(got) == ["b", "a"] and got["a"].numel() == 3
    array = base.numpy()
    array.flags.writeable = False
    taken = gather([array], [index.numpy()])[0]
    assert isinstance(taken, np.ndarray) and taken.tolist() == base.flatten()[index].tolist()


X = torch.ones(2, 3)
I = torch.tensor([0, 5])  # noqa: E741 - the positions, as in the formula
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], list[str]]] = {
    "past the end": ((X, torch.tensor([0, 6])), {}, ValueError, ["indices", "6"]),
    "negative": ((X, torch.tensor([-1, 2])), {}, ValueError, ["indices", "-1"]),
    "unsorted": ((X, torch.tensor([3, 2])), {}, ValueError, ["indices", "increasing"]),
    "twice": ((X, torch.tensor([3, 3])), {}, ValueError, ["indices", "increasing"]),
    "of an empty tensor": ((X[:0], torch.tensor([0])), {}, ValueError, ["indices", "0"]),
    "int32": ((X, I.int()), {}, TypeError, ["int64", "int32"]),
    "fewer": (([X, X], [I]), {}, ValueError, ["indices", "1", "2"]),
    "another name": (({"a": X}, {"b": I}), {}, ValueError, ["indices", "b"]),
    "integers": ((X.int(), I), {}, TypeError, ["sources", "int32"]),
    "not contiguous": ((X.t(), I), {}, ValueError, ["sources", "contiguous()"]),
    "indices not contiguous": (
        (X, torch.arange(4)[::2]),
        {},
        ValueError,
        ["indices", "contiguous()"],
    ),
    "dtype": ((X, I), {"dtype": torch.int32}, (TypeError, ValueError), ["dtype", "int32"]),
    "not a tensor": ((3.0, I), {}, TypeError, ["sources", "float"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    arguments, options, error, words = BAD[name]
    with pytest.raises(error) as caught:
        gather(*arguments, **options)
    text = str(caught.value)
    assert text.startswith("piece_ops.gather: "), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"
