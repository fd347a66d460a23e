"""Comparisons that, on failure, name the first bad element, both values and both bit patterns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that NaN equals itself and -0 differs from 0."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def _show(tensor: Tensor, at: int) -> str:
    size = tensor.element_size()
    pattern = int(bits(tensor.reshape(-1))[at]) & ((1 << (8 * size)) - 1)
    return f"{tensor.reshape(-1)[at].item()!r} (0x{pattern:0{2 * size}x})"


def describe_difference(got: Tensor, want: Tensor, bad: Tensor) -> str:
    """One line on the elements where `bad` (a mask over the flat elements) is true."""
    at = int(torch.nonzero(bad.reshape(-1))[0])
    return (
        f"{int(bad.sum())} of {bad.numel()} elements differ; first at flat position {at}: "
        f"got {_show(got, at)}, want {_show(want, at)}"
    )


def assert_bits_equal(got: Tensor, want: Tensor, what: str = "tensor") -> None:
    """The same dtype, shape and bytes."""
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    bad = bits(got) != bits(want)
    assert not bool(bad.any()), f"{what}: {describe_difference(got, want, bad)}"


def assert_all_bits_equal(got: Any, want: Any, what: str = "tensors") -> None:
    """`assert_bits_equal` over two structures (tensor, list, tuple or dict) of the same kind."""
    if isinstance(want, dict):
        assert isinstance(got, dict) and list(got) == list(want), f"{what}: {got} is not {want}"
        for key in want:
            assert_bits_equal(got[key], want[key], f"{what}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert type(got) is type(want), f"{what}: {type(got).__name__}, want {type(want).__name__}"
        assert len(got) == len(want), f"{what}: {len(got)} tensors, want {len(want)}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_bits_equal(a, b, f"{what}[{i}]")
    else:
        assert_bits_equal(got, want, what)


def ulp_distance(got: Tensor, want: Tensor) -> Tensor:
    """Units in the last place of float32 between two finite float32 tensors (int64)."""

    def ordered(x: Tensor) -> Tensor:
        b = x.detach().contiguous().view(torch.int32).to(torch.int64)
        return torch.where(b < 0, -(b & 0x7FFFFFFF), b)

    return (ordered(got) - ordered(want)).abs()


def assert_within(got: Tensor, want: Tensor, bound: Tensor, what: str = "tensor") -> None:
    """``|got - want| <= bound`` elementwise, in float64."""
    error = (got.double() - want.double()).abs()
    bad = ~(error <= bound)
    if bool(bad.any()):
        at = int(torch.nonzero(bad.reshape(-1))[0])
        allowed = float(bound.expand_as(error).reshape(-1)[at])
        raise AssertionError(
            f"{what}: {describe_difference(got, want, bad)}; "
            f"error {float(error.reshape(-1)[at]):g}, allowed {allowed:g}"
        )


def assert_same_selection(got: Any, want: Any, what: str) -> None:
    """Two TopK with equal indices, threshold and number of ties taken."""
    assert_all_bits_equal(got.indices, want.indices, f"{what}: indices")
    for field in ("threshold", "ties_kept"):
        a, b = getattr(got, field), getattr(want, field)
        # NaN (the threshold when nan="lowest" takes one) is equal to itself here.
        assert type(a) is type(b) and repr(a) == repr(b), f"{what}: {field} {a!r}, want {b!r}"
