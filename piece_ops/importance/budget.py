"""Selection with fewer bytes of accumulators than all candidates need: groups, and a running top-k.

Parameters are treated in groups, in the model's order, each as large as the budget allows and each
with a pass of its own over all batches; a group's best meet the best of the groups before it. A
matrix that does not fit by itself is treated some rows at a time, in groups after one another. If
all samples lie in one batch, one pass does: a parameter's sums are complete, and leave again, as
soon as backward has passed it. Either way the selection is that of unlimited memory: the sums of a
parameter do not depend on which other parameters are added up beside it, the running best keep
their sums, not rounded scores, and equal scores are ranked by position in the model as everywhere.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from piece_ops.functional import gather, select_topk
from piece_ops.importance.batched import BatchedGradients
from piece_ops.importance.candidates import Candidates, Rows, rows_together
from piece_ops.importance.rules import Target
from piece_ops.importance.scores import NEEDS, RANKED_BY, Numbers, totals_of
from piece_ops.importance.sources import show_progress
from piece_ops.importance.statistics import Statistics, check_overflow
from piece_ops.selection import Selection

if TYPE_CHECKING:
    from piece_ops.importance.estimator import Importance

_WHERE = "piece_ops.estimate"
Group = dict[str, Rows | None]  # parameters, and which of their rows; None: all


class RunningTop:
    """The k best coordinates of the parameters seen so far, with the numbers that rank them.

    `score` turns these numbers into what `select_topk` takes, and a factor for the threshold.
    """

    def __init__(
        self,
        k: int,
        order: Iterable[str],
        score: Callable[[Numbers], tuple[Any, float]],
        excluded: Mapping[str, Tensor],
    ) -> None:
        self._k, self._order, self._score, self._excluded = k, tuple(order), score, excluded
        self._indices: dict[str, Tensor] = {}
        self._numbers: Numbers = {}

    def merge(self, given: Numbers, begins: Mapping[str, int] | None = None) -> None:
        """Take the best of some more parameters, in any order.

        `begins`: the position of the first number, of those given in parts, one after the other.
        """
        begins = begins or {}
        given = {
            kind: {name: tensors[name] for name in self._order if name in tensors}
            for kind, tensors in given.items()
        }
        sizes = {name: tensor.numel() for name, tensor in next(iter(given.values())).items()}
        excluded = {
            name: _within(self._excluded[name], begins.get(name, 0), size)
            for name, size in sizes.items()
            if name in self._excluded
        }
        room = sum(sizes.values()) - sum(tensor.numel() for tensor in excluded.values())
        scores, _ = self._score(given)
        top = select_topk(scores, min(self._k, room), exclude=excluded or None)
        found = {n: i + begins.get(n, 0) for n, i in top.indices.items() if i.numel()}
        indices = _behind(self._indices, found)
        numbers = {
            kind: _behind(self._numbers.get(kind, {}), gather(dict(tensors), dict(top.indices)))
            for kind, tensors in given.items()
        }
        # In the model's order: positions then rank equal scores as in one selection over all.
        names = [name for name in self._order if name in indices]
        self._keep(indices, {kind: {n: held[n] for n in names} for kind, held in numbers.items()})

    def _keep(self, indices: dict[str, Tensor], numbers: Numbers) -> None:
        scores, _ = self._score(numbers)
        names = list(next(iter(numbers.values())))
        top = select_topk(scores, min(self._k, sum(indices[name].numel() for name in names)))
        self._indices = {name: indices[name][top.indices[name]] for name in names}
        self._numbers = {
            kind: gather(dict(held), dict(top.indices)) for kind, held in numbers.items()
        }

    def result(self) -> tuple[dict[str, Tensor], float]:
        """Indices by parameter, in the model's order, and the threshold."""
        scores, scale = self._score(self._numbers)
        return self._indices, float(select_topk(scores, self._k).threshold) * scale


def _within(positions: Tensor, begin: int, size: int) -> Tensor:
    """Those of the positions from `begin` on, counted from there."""
    return positions[(positions >= begin) & (positions < begin + size)] - begin


def _behind(held: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of both; of one parameter, the second behind the first."""
    joined = {name: torch.cat([held[name], more[name]]) for name in held.keys() & more.keys()}
    return {**held, **more, **joined}


class _Passing(Target):
    """Accumulators of the parameters under way; what is complete is merged and goes.

    Not each by itself: a merge takes as long for one norm as for a layer. So what is complete
    waits, up to `room` bytes.
    """

    once = True  # what is complete is ranked here, so nothing can be left to `finish`

    def __init__(self, part: Importance, merge: Callable[[Numbers], None], room: int) -> None:
        self._part, self._merge, self._room = part, merge, room
        self._complete: dict[str, dict[str, Tensor]] = {}
        self._sizes = bytes_of(part)
        self._waiting = 0  # bytes
        self._held: dict[str, dict[str, Tensor]] = {"square_sums": {}, "sums": {}}
        self._inner = part._target(self._held["square_sums"], self._held["sums"], 0, False)
        self.done: set[str] = set()
        super().__init__({}, {}, 0)

    def open(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        need = NEEDS[self._part.method]
        for kind, wanted in (("square_sums", need.square_sums), ("sums", need.sums)):
            if wanted and name not in self._held[kind]:
                self._held[kind][name] = self._part._zero(name)
        return self._inner.open(name)

    def note(self, name: str, overflowed: bool | None) -> None:
        self._inner.note(name, overflowed)

    def close(self, name: str) -> None:
        self._inner.close(name)
        check_overflow(self._inner.overflowed([name]), _WHERE)
        held = {kind: tensors.pop(name, None) for kind, tensors in self._held.items()}
        held["weights"] = self._part._candidates.parameters[name].detach()
        kinds = RANKED_BY[self._part.method]
        for kind in kinds:
            if (tensor := held[kind]) is not None:
                self._complete.setdefault(kind, {})[name] = tensor
        self.done.add(name)
        self._waiting += self._sizes[name]
        if self._waiting > self._room:
            self.flush()

    def flush(self) -> None:
        """Merge what is complete."""
        if self._complete:
            self._merge(self._complete)
        self._complete, self._waiting = {}, 0


def bytes_of(importance: Importance) -> dict[str, int]:
    """Accumulator bytes of every candidate, when most of them are needed."""
    sources, size = importance._sources, importance._dtype.itemsize
    need = NEEDS[importance.method]
    count = need.sums + need.square_sums
    if need.reference:
        # The running source, the mean of those before it, and what a stored one is read into.
        paths = [s for s in sources if s != "self" and isinstance(s, (str, os.PathLike))]
        count += 1 + (len(sources) > 1) + 2 * bool(paths)
    return {n: size * count * p.numel() for n, p in importance._candidates.parameters.items()}


@dataclass(frozen=True)
class Need:
    """Bytes that one parameter takes."""

    sums: int  # its accumulators
    passing: int  # with bfloat16 ones: the float32 sums in which a batch of it comes together
    module: int | None  # whose parameters come together at one time; None: several modules', so all
    # the while from the first of them to the end of the pass
    rows: int  # 1 if it is no matrix
    unit: int  # the fewest of its rows that are treated together

    def of(self, rows: int) -> Need:
        """What some of its rows take."""
        sums, passing = (size // self.rows * rows for size in (self.sums, self.passing))
        return replace(self, sums=sums, passing=passing, rows=rows)


def needs_of(importance: Importance) -> dict[str, Need]:
    """What every candidate takes."""
    parameters = importance._candidates.parameters
    need = NEEDS[importance.method]
    count = 0
    if importance._dtype != torch.float32:
        count = max(need.sums + need.square_sums, int(need.reference))
    owners: dict[int, list[int]] = {id(parameter): [] for parameter in parameters.values()}
    for module in importance.model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in owners:
                owners[id(parameter)].append(id(module))
    found = {}
    for name, size in bytes_of(importance).items():
        parameter = parameters[name]
        homes = owners[id(parameter)]
        home = homes[0] if len(homes) == 1 else None
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        unit = min(rows, rows_together(parameter))
        found[name] = Need(size, 4 * count * parameter.numel(), home, rows, unit)
    return found


def peak_of(needs: Iterable[Need], *, one_pass: bool = False) -> int:
    """Bytes of accumulators that a pass over these parameters has at most at one time.

    `one_pass`: they come and go with their module.
    """
    lasting, by_module = 0, Counter[int]()
    for need in needs:
        size = need.passing + need.sums if one_pass else need.passing
        lasting += 0 if one_pass else need.sums
        if need.module is None:
            lasting += size
        else:
            by_module[need.module] += size
    return lasting + max(by_module.values(), default=0)


def groups_within(needs: Mapping[str, Need], budget: int) -> list[Group]:
    """Consecutive parameters, or rows of one, that fit into the budget together.

    Raises
    ------
    ValueError
        One parameter alone needs more, even the fewest of its rows.
    """
    groups: list[Group] = [{}]
    held: list[Need] = []
    for name, need in needs.items():
        for rows in _pieces(name, need, budget):
            piece = need if rows is None else need.of(rows[1] - rows[0])
            if name in groups[-1] or peak_of([*held, piece]) > budget:
                groups.append({})
                held.clear()
            groups[-1][name] = rows
            held.append(piece)
    return groups


def _pieces(name: str, need: Need, budget: int) -> list[Rows | None]:
    """The parameter, or as many of its rows at a time as fit."""
    if peak_of([need]) <= budget:
        return [None]
    least = peak_of([need.of(need.unit)])
    if least > budget:
        what = repr(name) if need.unit == need.rows else f"{need.unit} rows of {name!r}"
        raise ValueError(
            f"{_WHERE}: memory_budget must be at least {least} bytes (the accumulators of {what}, "
            f"which are treated together), got {budget}; exclude= leaves a parameter out"
        )
    rows = budget // least * need.unit
    return [(first, min(first + rows, need.rows)) for first in range(0, need.rows, rows)]


def within_one_pass(needs: Mapping[str, Need], budget: int) -> list[str]:
    """Parameters that may come and go in one pass: all, if need be without the shared ones."""
    chosen = dict(needs)
    if peak_of(chosen.values(), one_pass=True) > budget:
        chosen = {name: need for name, need in needs.items() if need.module is not None}
    together: dict[int | None, list[Need]] = {}
    for need in chosen.values():
        together.setdefault(need.module, []).append(need)
    large = {
        module
        for module, held in together.items()
        if module is not None and peak_of(held, one_pass=True) > budget
    }
    return [name for name, need in chosen.items() if need.module not in large]


def select_within(
    importance: Importance,
    batches: Iterable[Any],
    k: int,
    budget: int,
    excluded: Mapping[str, Tensor],
    progress: bool,
) -> Selection:
    """What `Importance.select` chooses after `Importance.update` with all batches."""
    needs = needs_of(importance)
    groups = groups_within(needs, budget)
    repeatable = _repeatable(batches, "batches")
    importance = copy.copy(importance)
    importance._sources = [
        _repeatable(s, "reference") if _is_batches(s) else s for s in importance._sources
    ]
    if "self" in importance._sources:
        importance._written = list(importance._self_texts())
    plans = BatchedGradients(importance.model, importance._candidates.parameters)
    mean = _reference_mean(importance, plans, groups, progress)
    counts = (0, 1)  # samples, and reference samples

    def score(numbers: Numbers) -> tuple[Any, float]:
        return importance._scores(numbers, *counts, mean)

    top = RunningTop(k, importance.names, score, excluded)
    seen: set[int] = set()
    reached = False
    left = set(importance.names)
    is_one = isinstance(repeatable, list) and len(repeatable) == 1
    if is_one and not NEEDS[importance.method].reference:
        part = _part(importance, plans, dict.fromkeys(within_one_pass(needs, budget)))
        counts = (part._samples_in(repeatable[0], _WHERE), 1)
        seen.add(counts[0])
        peak = peak_of([needs[name] for name in part.names], one_pass=True)
        passing = _Passing(part, top.merge, budget - peak)
        missed = part._add(repeatable[0], _WHERE, part._loss_fn, passing)
        for name in part.names:
            if name not in missed and name not in passing.done:  # no gradient reached it
                passing.open(name)
                passing.close(name)
        passing.flush()
        left -= set(part.names) - missed
        reached = part._reached
    groups = [{name: rows for name, rows in group.items() if name in left} for group in groups]
    groups = [group for group in groups if group]
    for number, group in enumerate(groups):
        title = f"importance, part {number + 1} of {len(groups)}"
        part = _part(importance, plans, group)
        part.run_reference()
        for batch in show_progress(repeatable, title, progress):
            part.update(batch)
        seen.add(part.sample_count)
        if len(seen) > 1 or not part.sample_count:
            raise ValueError(
                f"{_WHERE}: batches must hold samples, the same in every pass, got "
                f"{' and '.join(map(str, sorted(seen)))} of them"
            )
        reached |= part._reached
        counts = (part.sample_count, part._numbers(_WHERE)[1])
        begins = {name: part._candidates.begin(name) for name in group}
        top.merge(part._numbers(_WHERE)[0], begins)
        part.reset()  # before the next one's accumulators come
    if not reached:
        raise ValueError(f"{_WHERE}: the loss must depend on the candidate parameters")
    return importance._selection(*top.result())


def _part(importance: Importance, plans: BatchedGradients, group: Group) -> Importance:
    """The same settings for some of the candidates, without statistics."""
    part = copy.copy(importance)
    parameters = importance._candidates.parameters
    part._candidates = Candidates(
        {name: parameters[name] for name in group},
        importance.total,
        {name: rows for name, rows in group.items() if rows is not None},
    )
    part.reset()
    part._batched = plans
    part._must_reach = part._candidates.count == importance.candidate_count
    return part


def _reference_mean(
    importance: Importance, plans: BatchedGradients, groups: list[Group], progress: bool
) -> float:
    """piece-g's constant, the mean of the reference over all candidates: a sweep of its own."""
    if not NEEDS[importance.method].reference:
        return 0.0
    totals: list[float] = []
    for group in groups:
        part = _part(importance, plans, group)
        part.run_reference(progress)
        squares, _ = part._reference_statistics(_WHERE)
        totals += totals_of(squares)
    return math.fsum(totals) / importance.candidate_count


def _is_batches(source: Any) -> bool:
    return not isinstance(source, (str, os.PathLike, Statistics))


def _repeatable(batches: Iterable[Any], what: str) -> Any:
    """Batches that can be iterated again and again; a list when it is only one."""
    iterator = iter(batches)
    first = list(islice(iterator, 2))
    if len(first) < 2:
        return first
    if iterator is batches:
        raise TypeError(
            f"{_WHERE}: with a memory_budget that needs several passes, {what} must be a sequence "
            f"or an object that can be iterated again, got a one-shot {type(batches).__name__}"
        )
    return batches
