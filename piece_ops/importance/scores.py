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
from dataclasses import dataclass

from torch import Tensor

from piece_ops.functional import Score, total


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


def scores_of(
    method: str,
    weights: dict[str, Tensor],
    sums: dict[str, Tensor],
    square_sums: dict[str, Tensor],
    reference: dict[str, Tensor],
    *,
    samples: int,
    reference_samples: int,
    xi: float | None,
    official: bool,
    seed: int,
    where: str,
) -> tuple[Score | dict[str, Tensor], float]:
    """What `select_topk` ranks, and the factor that puts its threshold on the scale of means."""
    if method == "piece-f":
        return square_sums, 1.0 if official else 1.0 / samples
    if method == "piece-s":
        constant = 1.0 if xi is None else xi * samples  # the default xi is 1 / samples
        scale = 1.0 if official else 1.0 / math.sqrt(samples)
        return Score("piece-s", sums, square_sums, constant=constant), scale
    if method == "piece-g":
        mean = total(reference) / sum(tensor.numel() for tensor in reference.values())
        if not 0.0 < mean < math.inf:
            raise ValueError(
                f"{where}: the mean of the reference's squared gradients must be positive and "
                f"finite, got {mean}"
            )
        return Score("piece-g", sums, reference, constant=mean), reference_samples / samples
    if method == "magnitude":
        return Score("magnitude", weights), 1.0
    if method == "gradient":
        return Score("magnitude", sums), 1.0 / samples
    if method == "snip":
        return Score("snip", sums, weights), 1.0 / samples
    if method == "taylor":
        return Score("taylor", square_sums, weights), 1.0 / samples
    return Score("random", weights, seed=seed), 1.0
