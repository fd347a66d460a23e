"""Bounds of the scores of every 32 elements, left by accumulation, used by selection on a GPU.

A chunk's entry is at least its largest score. One that is too large costs a read of the chunk; one
that is too small would hide it, so an entry counts only as long as the version counters of what it
was made of say that nobody else has written them since: anything else is read whole.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piece_ops.backends import _cuda_runtime, cuda
from piece_ops.backends._lists import addresses
from piece_ops.backends.cuda_select_topk import CHUNK

_version_of = operator.attrgetter("_version")
_OF_SQUARES = ("plain", "taylor")  # whose first statistic is the square sums; else the sums


@dataclass
class _Entry:
    """What the maxima of one tensor were made of, and as of when."""

    made_of: tuple[weakref.ref[Tensor], ...]  # first, and second where there is one
    state: list[tuple[int, int]]  # their addresses and versions; a view of the second has the same
    constant: float
    maxima: Tensor

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Are these the very tensors?"""
        return len(tensors) == len(self.made_of) and all(
            reference() is tensor for reference, tensor in zip(self.made_of, tensors, strict=True)
        )

    def holds(self, tensors: Sequence[Tensor], constant: float) -> bool:
        """Are these still bounds? A larger constant makes every score smaller."""
        return (
            self.made_of[0]() is tensors[0]
            and all(reference() is not None for reference in self.made_of)
            and self.state == _state(tensors)
            and self.constant <= constant
        )


def _state(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in tensors]


class _Lists:
    """What `_Entry` holds, for all tensors of one call: 0.3 us a tensor instead of 3."""

    def __init__(self, lists: tuple[Sequence[Tensor], ...], maxima: list[Tensor]) -> None:
        self.made_of = [list(map(weakref.ref, tensors)) for tensors in lists]
        self.maxima = maxima
        self.state: list[tuple[list[int], list[int]]] = []
        self.constant = 0.0
        self.watch: weakref.ref[Tensor] | None = None

    def is_of(self, lists: tuple[Sequence[Tensor], ...]) -> bool:
        """Are these the very tensors?"""
        return all(
            len(references) == len(tensors)
            # A living tensor has one reference without callback.
            and all(map(operator.is_, references, map(weakref.ref, tensors)))
            for references, tensors in zip(self.made_of, lists, strict=True)
        )

    def note(self, lists: tuple[Sequence[Tensor], ...], constant: float) -> None:
        """The maxima were written just now."""
        self.state, self.constant = self._state(lists), constant

    def holds(self, lists: tuple[Sequence[Tensor], ...], constant: float) -> bool:
        """Are they still bounds?"""
        return self.constant <= constant and self.is_of(lists) and self.state == self._state(lists)

    def entries(self) -> Iterator[tuple[tuple[Tensor, ...], _Entry]]:
        """One by one, of those that still live."""
        for t, maxima in enumerate(self.maxima):
            references = [column[t] for column in self.made_of if column]
            tensors = [reference() for reference in references]
            alive = [tensor for tensor in tensors if tensor is not None]
            if len(alive) == len(tensors):
                state = [(a[t], v[t]) for a, v in self.state if a]
                yield tuple(alive), _Entry(tuple(references), state, self.constant, maxima)

    @staticmethod
    def _state(lists: tuple[Sequence[Tensor], ...]) -> list[tuple[list[int], list[int]]]:
        return [(addresses(tensors), list(map(_version_of, tensors))) for tensors in lists]


class ChunkMaxima:
    """Lets a selection on a GPU read only what can matter of the accumulators it ranks.

    Give one to every `accumulate_squares_` (it then also writes 4 bytes for each 32 elements, 0.125
    an element) and to `select_topk` of the same accumulators, which then reads some 0.3 bytes an
    element instead of 4 (or 8). Never changes a result: what was written otherwise since, as
    tensors' version counters tell, is read whole; where that is more than half, everything is.
    (Writes that counters do not see, through ``.data`` or by replays of somebody's CUDA graph, must
    not come in between.) On the CPU, and for tensors of other libraries, it does nothing.

    Parameters
    ----------
    kind : str
        What will be ranked: "plain" (square sums), "piece-s" or "magnitude" (sums).
    constant : float
        Of "piece-s": at most that of the `Score` that will be ranked.

    Examples
    --------
    >>> import piece_ops, torch
    >>> maxima, square_sums = piece_ops.ChunkMaxima(), torch.zeros(100)
    >>> piece_ops.accumulate_squares_(square_sums, torch.arange(100.0), maxima=maxima)
    >>> piece_ops.select_topk(square_sums, 2, maxima=maxima).indices
    tensor([98, 99])
    """

    def __init__(self, kind: str = "plain", constant: float = 0.0) -> None:
        if kind not in cuda.MAXIMA_SCORES:
            raise ValueError(
                f"piece_ops.ChunkMaxima: kind must be one of {', '.join(cuda.MAXIMA_SCORES)}, "
                f"got {kind!r}"
            )
        self.kind, self.constant = kind, constant
        self._entries: dict[int, _Entry] = {}  # by id of the first statistic
        self._lists: _Lists | None = None  # of the last call with several tensors, not in _entries

    def accumulate(
        self,
        square_sums: list[Tensor],
        grads: list[Tensor],
        sums: list[Tensor],
        weight: float,
        second: Sequence[Tensor] = (),
        *,
        deferred: bool = False,
    ) -> Tensor | None:
        """``accumulate_squares_`` on CUDA tensors that leaves maxima; see `cuda.accumulate`."""
        first = square_sums if self.kind in _OF_SQUARES else sums
        if not first or (self.kind == "piece-s" and not square_sums):
            wanted = "square_sums" if self.kind in _OF_SQUARES else "sums"
            wanted += " and square_sums" if self.kind == "piece-s" else ""
            raise ValueError(
                f"piece_ops.accumulate_squares_: maxima of kind {self.kind!r} are made of {wanted},"
                " got maxima without them"
            )
        others = square_sums if self.kind == "piece-s" else list(second)
        lists = (first, others)
        known = self._lists if self._lists is not None and self._lists.is_of(lists) else None
        maxima = known.maxima if known else [self.room(tensor) for tensor in first]
        report = cuda.accumulate_squares_and_maxima_(
            square_sums,
            grads,
            sums,
            weight,
            maxima,
            self.kind,
            second,
            self.constant,
            deferred=deferred,
        )
        if len(first) == 1 or len(others) not in (0, len(first)):
            for t, tensor in enumerate(first):
                self.note((tensor, *others[t : t + 1]), maxima[t])
        else:
            self._lists = known or _Lists(lists, maxima)
            self._lists.note(lists, self.constant)
            if not known:
                # As entries go with their tensor, these go with the first of theirs.
                self._lists.watch = weakref.ref(first[0], lambda _: self._single_out())
                for tensor in first:
                    self._entries.pop(id(tensor), None)
        return report

    def _single_out(self) -> None:
        """Lists that do not come again as they were: an entry for each of their tensors."""
        lists, self._lists = self._lists, None
        for tensors, entry in lists.entries() if lists else ():
            self._put(tensors, entry)

    def _put(self, tensors: tuple[Tensor, ...], entry: _Entry) -> None:
        key = id(tensors[0])
        first = weakref.ref(tensors[0], lambda _: self._entries.pop(key, None))
        entry.made_of = (first, *map(weakref.ref, tensors[1:]))
        self._entries[key] = entry

    def room(self, tensor: Tensor) -> Tensor:
        """Where the maxima of a first statistic are to be written."""
        self._single_out()
        entry = self._entries.get(id(tensor))
        n = (tensor.numel() + CHUNK - 1) // CHUNK
        if entry is not None and entry.made_of[0]() is tensor and entry.maxima.numel() == n:
            return entry.maxima
        return torch.empty(n, dtype=torch.float32, device=tensor.device)

    def note(self, tensors: tuple[Tensor, ...], maxima: Tensor) -> None:
        """Remember the maxima of tensors[0] (and its second statistic), written just now."""
        self._single_out()
        entry = self._entries.get(id(tensors[0]))
        if entry is not None and entry.is_of(tensors):  # keeps its references
            entry.state, entry.constant, entry.maxima = _state(tensors), self.constant, maxima
            return
        self._put(tensors, _Entry((), _state(tensors), self.constant, maxima))

    def of(
        self, first: Sequence[Tensor], second: Sequence[Tensor], kind: str, constant: float
    ) -> list[Tensor]:
        """Maxima for a selection; none where too little is known for them to pay."""
        if kind != self.kind or cuda.has_captured(first[0]):
            return []
        if self._lists is not None and self._lists.holds((first, second), constant):
            return self._lists.maxima
        self._single_out()
        found, known, total = [], 0, 0
        unknown = torch.empty(0)
        for t, tensor in enumerate(first):
            entry = self._entries.get(id(tensor))
            n = tensor.numel()
            total += n
            if entry is not None and entry.holds((tensor, *second[t : t + 1]), constant):
                known += n
                found.append(entry.maxima)
            else:
                found.append(unknown)
        if 2 * known < total:
            return []
        for t, (tensor, maxima) in enumerate(zip(first, found, strict=True)):
            if maxima is unknown:
                n = (tensor.numel() + CHUNK - 1) // CHUNK
                found[t] = torch.full((n,), float("inf"), device=tensor.device)
        return found


def takes(tensors: Sequence[Tensor]) -> bool:
    """Do these go to the CUDA backend, and have version counters?"""
    return (
        bool(tensors)
        and _cuda_runtime.runtime.takes(tensors[0])
        and not any(map(Tensor.is_inference, tensors))
    )
