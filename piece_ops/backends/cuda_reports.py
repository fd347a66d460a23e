"""What many accumulations on a GPU have to say, read together: one wait instead of one for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Factor:
    """Whether each token's row is finite, and where samples begin."""

    finite: Tensor
    offsets: Sequence[int]


class Reports:
    """Notes that lie on the device until `first_bad` reads them all at once.

    A note is a label and a number there: not 0, if something was not finite.
    """

    def __init__(self) -> None:
        self._labels: list[Any] = []
        self._words: list[Tensor] = []
        self._factors: list[_Factor | None] = []

    def add_accumulation(self, label: Any, report: Tensor) -> None:
        """What `cuda.accumulate` returned for one tensor: its count of what is not finite."""
        self._put(label, report[1:], None)

    def add_factor(self, label: Any, factor: Tensor, offsets: Sequence[int]) -> None:
        """One [tokens, features] side of a product, whose sample n begins at token offsets[n]."""
        # Both extremes of a NaN are NaN. A norm in float32 would be taken of a wider copy, which is
        # five times the bytes: 118 GB in an importance pass of 4.5e9 weights and 8,192 tokens.
        low, high = torch.aminmax(factor, dim=1)
        finite = (low > -math.inf) & (high < math.inf)
        self._put(label, (~finite.all()).to(torch.int64).view(1), _Factor(finite, offsets))

    def _put(self, label: Any, word: Tensor, factor: _Factor | None) -> None:
        self._labels.append(label)
        self._words.append(word)
        self._factors.append(factor)

    def first_bad(self) -> tuple[Any, int | None] | None:
        """Wait, forget all notes, and return the first bad one: label, and sample of a factor."""
        labels, words, factors = self._labels, self._words, self._factors
        self._labels, self._words, self._factors = [], [], []
        if not words:
            return None
        for label, word, factor in zip(labels, torch.cat(words).tolist(), factors, strict=True):
            if not word:
                continue
            if factor is None:
                return label, None
            finite = factor.finite.tolist()
            spans = enumerate(pairwise(factor.offsets))
            return label, next(n for n, (a, b) in spans if not all(finite[a:b]))
        return None
