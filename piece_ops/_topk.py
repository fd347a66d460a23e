"""What select_topk takes besides plain scores, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from piece_ops._schema import SCORE_CODES, SCORES_WITH_SECOND


@dataclass(frozen=True)
class Score:
    """A score computed on the fly from accumulated statistics, never written to memory.

    All arithmetic is float32, exactly as written:

    ============= ==================================== ==================================
    kind          score                                first, second
    ============= ==================================== ==================================
    ``piece-s``   |first| / sqrt(second + constant)    sums, square sums
    ``piece-g``   |first| / (second + constant)        sums, square sums of what is kept
    ``magnitude`` |first|                              sums or weights, none
    ``snip``      |first * second|                     sums, weights
    ``taylor``    first * (second * second)            square sums, weights
    ``random``    uniform in [0, 1)                    anything of the sizes wanted (unread)
    ============= ==================================== ==================================

    Parameters
    ----------
    kind : str
        One of the above.
    first, second : array, or list, tuple or dict of arrays
        float32, bfloat16 or float16, contiguous, pairwise of equal size.
    constant : float
        Added as above; on the scale of ``second``.
    seed : int
        Of ``random``, whose score depends on the seed and on the position in the caller's order.

    Examples
    --------
    >>> import piece_ops, torch
    >>> sums, square_sums = torch.tensor([3.0, -4.0, 0.0]), torch.tensor([9.0, 1.0, 1.0])
    >>> score = piece_ops.Score("piece-s", sums, square_sums, constant=0.0)
    >>> piece_ops.select_topk(score, 1).indices
    tensor([1])
    """

    kind: str
    first: Any
    second: Any = None
    constant: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = tuple(kind for kind in SCORE_CODES if kind != "plain")
        if self.kind not in known:
            raise ValueError(
                f"piece_ops.Score: kind must be one of {', '.join(known)}, got {self.kind!r}"
            )
        if (self.second is not None) != (self.kind in SCORES_WITH_SECOND):
            wanted, got = ("a", "none") if self.second is None else ("no", "one")
            raise ValueError(
                f"piece_ops.Score: {self.kind!r} takes {wanted} second statistic, got {got}"
            )


@dataclass(frozen=True)
class TopK:
    """What select_topk found.

    Attributes
    ----------
    indices : array, or list, tuple or dict of arrays
        int64 flat positions inside each tensor, strictly increasing; arranged, and of the array
        type and device, like the scores (int32 from JAX without x64, which has no int64).
    threshold : float
        The k-th largest score (inf when k is 0). With scope "tensor": one each, arranged.
    ties_kept : int
        How many selected elements equal the threshold. With scope "tensor": one each, arranged.
    """

    indices: Any
    threshold: Any
    ties_kept: Any
