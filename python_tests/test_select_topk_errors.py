"""select_topk refuses bad arguments, saying where, what was wanted and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from piece_ops.functional import Score, select_topk

X = torch.tensor([3.0, 1.0, 2.0, 5.0])
NAN = float("nan")


def positions(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# id: (scores or what makes them, k, options, error, words that the message must hold)
BAD: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], list[str]]] = {
    "k above n": (X, 5, {}, ValueError, ["k must be in 0..4", "got 5"]),
    "k negative": (X, -1, {}, ValueError, ["0..4", "got -1"]),
    "k of an empty list": ([], 1, {}, ValueError, ["0..0", "got 1"]),
    "k a float": (X, 2.0, {}, TypeError, ["k ", "float"]),
    "k a string": (X, "2", {}, TypeError, ["k ", "str"]),
    "k above the candidates": (
        X,
        3,
        {"exclude": positions(0, 1)},
        ValueError,
        ["0..2", "got 3"],
    ),
    "k per tensor above n": ([X, X[:2]], [1, 3], {"scope": "tensor"}, ValueError, ["0..2", "3"]),
    "k per tensor, too few": ([X, X], [1], {"scope": "tensor"}, ValueError, ["2", "1"]),
    "k a list, global": ([X, X], [1, 1], {}, TypeError, ["k ", "[1, 1]"]),
    "scope": (X, 1, {"scope": "layer"}, ValueError, ["scope", "global", "tensor", "'layer'"]),
    "nan": (X, 1, {"nan": "ignore"}, ValueError, ["nan", "raise", "lowest", "'ignore'"]),
    "algorithm": (X, 1, {"algorithm": "sort"}, ValueError, ["algorithm", "radix", "'sort'"]),
    "integers": (torch.arange(4), 1, {}, TypeError, ["float32", "int64"]),
    "integers, NumPy": (np.arange(4), 1, {}, TypeError, ["float32", "int64"]),
    "booleans": (torch.ones(4, dtype=torch.bool), 1, {}, TypeError, ["bool"]),
    "complex": (torch.ones(4, dtype=torch.complex64), 1, {}, TypeError, ["complex64"]),
    "float64 among float32": ([X, X.double()], 1, {}, TypeError, ["float64"]),
    "a string": ("scores", 1, {}, TypeError, ["str"]),
    "nothing": (None, 1, {}, TypeError, ["None"]),
    "numbers in a list": ([1.0, 2.0], 1, {}, TypeError, ["float"]),
    "not contiguous": (torch.rand(4, 4).t(), 1, {}, ValueError, ["contiguous"]),
    "not contiguous, in a dict": (
        {"a": X, "norm.bias": torch.rand(8)[::2]},
        1,
        {},
        ValueError,
        ["norm.bias", "contiguous()"],
    ),
    "not contiguous, NumPy": (np.ones((3, 4), np.float32).T, 1, {}, ValueError, ["contiguous"]),
    "NaN": (torch.tensor([1.0, NAN, NAN]), 1, {}, ValueError, ["NaN", "2"]),
    "NaN in a list": ([X, torch.tensor([1.0, NAN, NAN])], 1, {}, ValueError, ["1", "NaN", "2"]),
    "NaN in a dict": (
        {"x": X, "norm.bias": torch.tensor([NAN])},
        1,
        {},
        ValueError,
        ["norm.bias", "NaN", "1"],
    ),
    "NaN per tensor": (
        {"x": X, "norm.bias": torch.tensor([NAN])},
        1,
        {"scope": "tensor"},
        ValueError,
        ["norm.bias", "NaN", "1"],
    ),
    "exclude twice": (X, 1, {"exclude": positions(1, 1)}, ValueError, ["exclude", "increasing"]),
    "exclude unsorted": (X, 1, {"exclude": positions(2, 1)}, ValueError, ["exclude", "increasing"]),
    "exclude past the end": (X, 1, {"exclude": positions(1, 4)}, ValueError, ["exclude", "4"]),
    "exclude negative": (X, 1, {"exclude": positions(-1, 2)}, ValueError, ["exclude", "-1"]),
    "exclude int32": (X, 1, {"exclude": positions(1).int()}, TypeError, ["int64", "int32"]),
    "exclude a mask": (X, 1, {"exclude": X > 1}, TypeError, ["int64", "bool"]),
    "exclude too short": ([X, X], 1, {"exclude": [positions(1)]}, ValueError, ["exclude", "2"]),
    "exclude an unknown name": ({"a": X}, 1, {"exclude": {"b": positions(1)}}, ValueError, ["b"]),
    "exclude another structure": ({"a": X}, 1, {"exclude": [positions(1)]}, TypeError, ["exclude"]),
    "score kind": (lambda: Score("magnitud", X), 1, {}, ValueError, ["magnitud", "piece-s"]),
    "score with too much": (
        lambda: Score("random", X, X),
        1,
        {},
        ValueError,
        ["second"],
    ),
    "score without second": (lambda: Score("piece-s", X), 1, {}, ValueError, ["second"]),
    "score of other sizes": (lambda: Score("snip", X, X[:3]), 1, {}, ValueError, ["second"]),
    "score of other names": (
        lambda: Score("snip", {"a": X}, {"b": X}),
        1,
        {},
        ValueError,
        ["second", "b"],
    ),
    "score of float64": (
        lambda: Score("snip", X.double(), X.double()),
        1,
        {},
        TypeError,
        ["float64"],
    ),
    "score of integers": (lambda: Score("magnitude", torch.arange(4)), 1, {}, TypeError, ["int64"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    scores, k, options, error, words = BAD[name]
    with pytest.raises(error) as caught:
        select_topk(scores() if callable(scores) else scores, k, **options)
    text = str(caught.value)
    assert text.startswith(("piece_ops.select_topk: ", "piece_ops.Score: ")), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"


def test_bad_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="constant"):
        select_topk(Score("piece-s", X, X, constant=NAN), 1)


def test_sizes_that_overflow_nothing() -> None:
    """k is compared with the number of candidates, however large k is."""
    with pytest.raises(ValueError, match="got 9223372036854775807"):
        select_topk(X, 2**63 - 1)
    with pytest.raises((ValueError, OverflowError, TypeError)):
        select_topk(X, 2**64)
