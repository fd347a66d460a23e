"""What a GPU adds to adding: bounds for the selection that follows, and one wait a backward.

`OnDevice` leaves the maxima of chunks that `ChunkMaxima` keeps, and collects what must be reported
(a gradient that is not finite) until the end of the backward. On the CPU it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from piece_ops.backends import cuda, cuda_maxima, triton
from piece_ops.backends.cuda_maxima import ChunkMaxima
from piece_ops.backends.cuda_reports import Reports

# What a method's accumulators will be ranked as. piece-g's scores need its reference's mean, which
# is not known yet; magnitude and random have no accumulators.
RANKED_AS = {
    "piece-f": "plain",
    "piece-s": "piece-s",
    "gradient": "magnitude",
    "snip": "snip",
    "taylor": "taylor",
}


class OnDevice:
    """For the gradients of one statistics' task or reference.

    Parameters
    ----------
    maxima : ChunkMaxima or None
        Where bounds go.
    weight_of : callable
        The weight of a parameter, by name: the second statistic of snip and taylor.
    """

    def __init__(self, maxima: ChunkMaxima | None, weight_of: Callable[[str], Tensor]) -> None:
        self._maxima, self._weight_of = maxima, weight_of
        self._reports = Reports()

    @staticmethod
    def takes(tensor: Tensor) -> bool:
        """Whether a gradient is on its device."""
        return cuda_maxima.takes([tensor])

    def add(
        self,
        label: tuple[str, int | None],
        squares: Tensor | None,
        grad: Tensor,
        sums: Tensor | None,
    ) -> bool:
        """Add one gradient, its report left for `first_bad`; False where this is not its device."""
        if not self.takes(grad):
            return False
        lists = ([] if squares is None else [squares], [grad], [] if sums is None else [sums])
        if self._maxima is None:
            report = cuda.accumulate(*lists, 1.0, deferred=True)
        else:
            second = [self._weight_of(label[0])] if self._maxima.kind in ("snip", "taylor") else []
            report = self._maxima.accumulate(*lists, 1.0, second, deferred=True)
        if report is not None:
            self._reports.add_accumulation(label, report)
        return True

    def add_product(
        self,
        name: str,
        squares: Tensor | None,
        left: Tensor,
        right: Tensor,
        offsets: Tensor,
        sums: Tensor | None,
        scales: Tensor | None,
    ) -> bool:
        """``accumulate_per_sample_squares_``, likewise; not where kernels are emulated."""
        if not left.is_cuda or not left.numel() or torch.cuda.is_current_stream_capturing():
            return False
        for side in (left, right):
            self.check(name, side, offsets)
        arguments = (squares, left, right, offsets, sums, scales)
        maxima = self._maxima
        first = None if maxima is None else (squares if maxima.kind == "plain" else sums)
        if maxima is None or first is None:
            triton.accumulate_finite(*arguments)
            return True
        room = maxima.room(first)
        if triton.accumulate_finite(*arguments, (room, maxima.kind, maxima.constant)):
            others = [squares] if maxima.kind == "piece-s" and squares is not None else []
            maxima.note((first, *others), room)
        return True

    def check(self, name: str, tensor: Tensor, bounds: Tensor) -> bool:
        """Note whether a matrix of tokens is finite; False where this is not its device."""
        if not self.takes(tensor):
            return False
        self._reports.add_factor((name, None), tensor, bounds.tolist())
        return True

    def first_bad(self) -> tuple[str, int | None] | None:
        """Wait; the first parameter with a gradient that is not finite, and its sample if known."""
        found = self._reports.first_bad()
        if found is None:
            return None
        (name, row), sample = found
        return name, row if sample is None else sample
