"""``sparse_adamw_`` step after step on the same CUDA tensors: checked and laid out once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from piece_ops import _schema
from piece_ops.backends._cuda_runtime import place_of
from piece_ops.backends._lists import addresses, sizes
from piece_ops.backends.cuda import adamw_table

_UNKNOWN = -1  # the version of a tensor that counts none


class SparseAdamwPlan:
    """``sparse_adamw_`` on fixed tensors, checked and laid out once: some 10 us of host a step.

    The addresses of all tensors must stay. It keeps them alive, but for the gradients: those the
    caller keeps, or sees come back to the same addresses. Version counters are not bumped.

    Parameters
    ----------
    weights, indices, values, grads, exp_avgs, exp_avg_sqs : list of Tensor
        As for ``piece_ops.sparse_adamw_``, on one CUDA device.
    """

    def __init__(
        self,
        weights: list[Tensor],
        indices: list[Tensor],
        values: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
    ) -> None:
        lists = (weights, indices, values, grads, exp_avgs, exp_avg_sqs)
        _schema.check_sparse_adamw_(*lists, 1, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.held = (weights, indices, values, exp_avgs, exp_avg_sqs)
        self._is_empty = not any(map(Tensor.numel, indices))
        if self._is_empty:
            return
        self._place = place_of("sparse_adamw_", weights[0])
        with self._place.guard:
            self._made_on = self._place.where
            self._table = adamw_table(self._place, *lists)

    @property
    def is_on_current_stream(self) -> bool:
        """Is the stream that the plan was made on still the current one of its device?"""
        return self._is_empty or self._made_on == self._place.where

    def step(
        self,
        step: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """One update; ``step`` counts from 1. One launch on the current stream, no waiting.

        If that is not the stream the plan was made on, the caller orders the two.
        """
        if self._is_empty:
            return
        with self._place.guard:
            self._place.module.cuda_sparse_adamw(
                *self._table.pair, step, lr, *betas, eps, weight_decay, *self._place.where
            )


class SparseAdamwSteps:
    """``sparse_adamw_`` for an optimizer, called as that is: keeps a plan as long as it fits.

    A plan fits while the tensors are the same objects at the same addresses and nobody has written
    the indices. Gradients may be other tensors every time, as ``zero_grad`` makes them: theirs are
    address, size, dtype and layout. For 291 tensors this look takes about a third of the time that
    checking and laying out takes.
    """

    def __init__(self) -> None:
        self._plan: SparseAdamwPlan | None = None
        self._seen: list[list[Any]] = []

    def __call__(
        self,
        weights: list[Tensor],
        indices: list[Tensor],
        values: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        _schema.check_adamw_numbers(step, lr, *betas, eps, weight_decay)
        held = (weights, indices, values, exp_avgs, exp_avg_sqs)
        seen: list[list[Any]] = [
            *map(addresses, (*held, grads)),
            [_UNKNOWN if index.is_inference() else index._version for index in indices],
            sizes(grads),
            [grad.dtype for grad in grads],
        ]
        fits = (
            self._plan is not None
            and seen == self._seen
            and all(map(_are_the_same, held, self._plan.held))
            and all(map(Tensor.is_contiguous, grads))
            and _UNKNOWN not in seen[len(held) + 1]
            and self._plan.is_on_current_stream
        )
        if not fits:
            self._plan = SparseAdamwPlan(weights, indices, values, grads, exp_avgs, exp_avg_sqs)
            self._seen = seen
        assert self._plan is not None
        self._plan.step(step, lr, betas, eps, weight_decay)
        _schema.bump_versions(weights, values, exp_avgs, exp_avg_sqs)


def _are_the_same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))
