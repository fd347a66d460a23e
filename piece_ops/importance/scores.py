"""From accumulated sums to scores: what each method needs and what it ranks by.

The accumulators hold sums over n samples; the formulas are stated on means. Dividing a formula by
a positive constant keeps its order, so the kernels score the sums directly and the threshold is
rescaled afterwards:

    method      ranks by                        on means                        threshold times
    piece-f     sum g^2                         mean g^2                        1 / n
    piece-s     |sum g| / sqrt(sum g^2 + xi n)  |mean g| / sqrt(mean g^2 + xi)  1 / sqrt(n)
    piece-g     |sum g| / (R + c r)             |mean g| / (R / r + c)          r / n
    gradient    |sum g|                         |mean g|                        1 / n
    snip        |sum g * w|                     |mean g * w|                    1 / n
    taylor      sum g^2 * w^2                   mean g^2 * w^2                  1 / n
    magnitude   |w|                             |w|                             1
    random      hash(seed, position)            uniform in [0, 1)               1

R is the sum of squares over r reference samples and c the mean of R / r over all candidates. With
several reference sources R / r is the sum of their means and r is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from piece_ops.functional import Score, total
from piece_ops.importance.candidates import rows_together


@dataclass(frozen=True)
class Needs:
    """What a method accumulates."""

    sums: bool
    square_sums: bool
    reference: bool = False

    @property
    def data(self) -> bool:
        """Whether the method looks at data at all."""
        return self.sums or self.square_sums


NEEDS = {
    "piece-f": Needs(sums=False, square_sums=True),
    "piece-s": Needs(sums=True, square_sums=True),
    "piece-g": Needs(sums=True, square_sums=False, reference=True),
    "magnitude": Needs(sums=False, square_sums=False),
    "gradient": Needs(sums=True, square_sums=False),
    "snip": Needs(sums=True, square_sums=False),
    "taylor": Needs(sums=False, square_sums=True),
    "random": Needs(sums=False, square_sums=False),
}


# Weights, sums, square_sums and reference, each by parameter.
Numbers = Mapping[str, dict[str, Tensor]]

# The kinds of numbers that a method ranks by.
RANKED_BY = {
    "piece-f": ("square_sums",),
    "piece-s": ("sums", "square_sums"),
    "piece-g": ("sums", "reference"),
    "magnitude": ("weights",),
    "gradient": ("sums",),
    "snip": ("sums", "weights"),
    "taylor": ("square_sums", "weights"),
    "random": ("weights",),  # their sizes only
}


def totals_of(reference: Mapping[str, Tensor]) -> list[float]:
    """The sums of squares, in float64, of rows that are always treated together.

    `math.fsum` of these does not depend on whether all parameters, and all their rows, are there
    at once.
    """
    return [
        total(matrix[first : first + rows])
        for tensor in reference.values()
        for matrix in [tensor if tensor.dim() > 1 else tensor.view(1, -1)]
        for rows in [rows_together(matrix)]
        for first in range(0, matrix.shape[0], rows)
    ]


def scores_of(
    method: str,
    numbers: Numbers,
    *,
    samples: int,
    reference_samples: int,
    reference_mean: float,
    xi: float | None,
    official: bool,
    seed: int,
    where: str,
) -> tuple[Score | dict[str, Tensor], float]:
    """What `select_topk` ranks, and the factor that puts its threshold on the scale of means."""
    first, second = (*(numbers[kind] for kind in RANKED_BY[method]), None)[:2]
    assert first is not None
    if method == "piece-f":
        return first, 1.0 if official else 1.0 / samples
    if method == "piece-s":
        constant = 1.0 if xi is None else xi * samples  # the default xi is 1 / samples
        scale = 1.0 if official else 1.0 / math.sqrt(samples)
        return Score("piece-s", first, second, constant=constant), scale
    if method == "piece-g":
        if not 0.0 < reference_mean < math.inf:
            raise ValueError(
                f"{where}: the mean of the reference's squared gradients must be positive and "
                f"finite, got {reference_mean}"
            )
        return Score("piece-g", first, second, constant=reference_mean), reference_samples / samples
    if method == "random":
        return Score("random", first, seed=seed), 1.0
    kind = method if second is not None else "magnitude"
    return Score(kind, first, second), 1.0 if method == "magnitude" else 1.0 / samples
