"""How a batch's loss is made of its samples' own losses, and so which factor their gradients need.

A sample's gradient is that of its own loss, as if it were alone. In a batch it arrives with a
weight: c_n / C under a mean over all C answer tokens (c_n of them the sample's), 1 / N under a mean
over N samples, 1 under a sum. The factor is one over the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from piece_ops.importance.batches import Samples

# In the order in which equally good ones are taken.
CONVENTIONS = ("mean over predicted tokens", "mean over labelled tokens", "mean over rows", "sum")


Counts = list[tuple[int, int]]


def answer_tokens(samples: Samples) -> Counts:
    """Labels of each sample that count: those that a token before predicts, and all of them."""
    return [_answer_tokens(part) for part in samples.parts]


def _answer_tokens(part: Any) -> tuple[int, int]:
    labels = part.get("labels") if isinstance(part, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels[0].numel() < 2:
        return 1, 1
    counted = labels != -100
    return int(counted[..., 1:].sum()), int(counted.sum())


def weights(counts: Counts) -> dict[str, tuple[float, ...]]:
    """The samples' weights in the batch's loss, under every convention that makes sense here."""
    found = {}
    for name, one in zip(CONVENTIONS[:2], zip(*counts, strict=True), strict=True):
        if total := sum(one):
            found[name] = tuple(count / total for count in one)
    found[CONVENTIONS[2]] = (1.0 / len(counts),) * len(counts)
    found[CONVENTIONS[3]] = (1.0,) * len(counts)
    return found


def agree(names: tuple[str, ...], counts: Counts) -> bool:
    """Whether these conventions all give the samples of this batch the same weights."""
    given = weights(counts)
    return len({given.get(name) for name in names}) == 1


def matching(measured: Mapping[int, float], counts: Counts, tolerance: float) -> tuple[str, ...]:
    """The conventions nearest to the measured weights of some samples, if within the tolerance."""
    errors = {
        name: max(
            abs(weight / given[n] - 1.0) if given[n] else math.inf for n, weight in measured.items()
        )
        for name, given in weights(counts).items()
    }
    best = min(errors.values())
    # Conventions that cannot be told apart on this batch have the same weights, hence errors.
    return tuple(n for n, error in errors.items() if error == best) if best <= tolerance else ()
