"""What must hold before samples may share a backward, learned by running two of them also alone.

Two different samples are run together and each by itself, forward and backward, without weight
gradients. From that is learned, by comparing numbers (see `Sketch` and `TOLERANCE`):

- how the samples lie in the tensors of every module that owns candidates; a module that sees
  something else in a batch than alone (dropout, a table without sample dimension, tokens sorted
  by expert) goes by the loop over single samples;
- the weights that the batch's loss gives to its samples' own losses (see `conventions`), from the
  gradient at the output of the first such module that holds samples one by one. Where a sample's
  gradient depends on the other sample (a contrastive loss), everything goes by the loop;
- which parameters are read by others than their own modules; these go by the loop.

It costs about four rows of a forward and backward, once for every kind of batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from piece_ops.importance.batches import Grid, Samples
from piece_ops.importance.conventions import answer_tokens, matching, weights
from piece_ops.importance.layouts import Layout, ModuleLayout, Sketch, cut, fits
from piece_ops.importance.passes import LossFunction, check_loss, loss_of, prepared
from piece_ops.importance.taps import Taps

# Largest relative difference (in norm) between a sample in a batch and alone. Rounding through a
# deep model stays below 1e-4 in float32; in half precision it reaches some 1e-2.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
# The same beside two others in batches of one shape: in half precision, too, most operations then
# round alike, and what differs comes through the few that do not.
TOLERANCE_BESIDE = 0.05
_PROBES = 8  # modules that may be tried as the one whose gradients are compared

Owned = Mapping[nn.Module, Mapping[str, str]]  # module -> its own parameters' attribute -> name


@dataclass
class Plan:
    """How batches of one kind are treated."""

    layouts: dict[nn.Module, ModuleLayout] = field(default_factory=dict)
    trouble: dict[nn.Module, str] = field(default_factory=dict)  # modules that go by the loop
    readers: dict[int, set[nn.Module | None]] = field(default_factory=dict)  # see `Taps.readers`
    conventions: tuple[str, ...] = ()
    coupled: str = ""  # why nothing may be batched
    shares: bool = True  # whether results are given a row for every sample (see `share`)
    elementwise: dict[nn.Module, bool] = field(default_factory=dict)  # see `elementwise.agree`


def choose_pair(samples: Samples) -> tuple[int, int] | None:
    """Two samples that differ, with answers, and that tell conventions apart if any do."""
    counts = answer_tokens(samples)
    able = [n for n, (predicted, _) in enumerate(counts) if predicted]
    best, pair = 0, None
    for a, b in islice(combinations(able, 2), 500):
        kinds = len(set(weights([counts[a], counts[b]]).values()))
        if kinds > best and not _equal(samples.parts[a], samples.parts[b]):
            best, pair = kinds, (a, b)
    return pair


def _equal(one: Any, two: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(two), strict=True)
    return all(not isinstance(a, Tensor) or torch.equal(a, b) for a, b in pairs)


def learn(
    model: nn.Module,
    samples: Samples,
    pair: tuple[int, int],
    loss_fn: LossFunction | None,
    owned: Owned,
    *,
    first: int,
    where: str,
) -> Plan:
    """Run the two samples together and alone; `first`: the number of the batch's first sample."""
    if why := _known_coupling(model):
        return Plan(coupled=why)
    together = samples.take(pair)
    places = pair if samples.grid.spans else (0, 1)
    batches = [
        (together.batch, together.grid, places),
        *((samples.parts[n], Grid(1), (0,)) for n in pair),
    ]
    names = [f"sample {first + n} (row {n} of its batch)" for n in pair]
    barred: set[nn.Module] = set()
    shares = True
    while True:
        runs = [_Run(model, owned, grid, chosen, barred, shares) for _, grid, chosen in batches]
        try:
            for run, (batch, _, _), what in zip(
                runs, batches, [" and ".join(names), *names], strict=True
            ):
                run.go(batch, loss_fn, what, where)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if not shares:
                return Plan(coupled=f"two of its samples do not run: {error}")
            shares = False  # the model may insist on a first dimension of one
            continue
        plan = Plan(readers=runs[0].readers, shares=shares)
        for module in owned:
            calls = [run.calls.get(module, []) for run in runs]
            result = _layout(calls[0], calls[1:], runs[0].tolerance)
            if isinstance(result, ModuleLayout):
                plan.layouts[module] = result
            elif result:
                plan.trouble[module] = result
        probe = runs[0].probe
        if probe is None or len(barred) >= _PROBES:
            plan.coupled = (
                "no module computes for a sample beside another as it does alone (dropout?)"
            )
            return plan
        if probe in plan.layouts and all(run.probed is not None for run in runs):
            _weigh(plan, runs[0], runs[1:], together, places)
            third = None if plan.coupled else _alike(samples, pair)
            if third is not None and runs[0].tolerance > TOLERANCE_BESIDE:
                beside = samples.take((pair[0], third))
                again = _Run(model, owned, beside.grid, (0, 1), barred, shares)
                again.go(beside.batch, loss_fn, f"{names[0]} and another", where)
                _compare_company(plan, runs[0], again)
            return plan
        barred.add(probe)


def _alike(samples: Samples, pair: tuple[int, int]) -> int | None:
    """A sample that may take the second one's place without changing the first one's weight."""
    if samples.grid.spans:
        return None
    counts = answer_tokens(samples)
    for n, part in enumerate(samples.parts):
        is_other = n not in pair and not _equal(part, samples.parts[pair[1]])
        if is_other and counts[n] == counts[pair[1]]:
            return n
    return None


def _compare_company(plan: Plan, one: _Run, other: _Run) -> None:
    """Find a dependence that half precision hides: the first sample beside two different ones."""
    assert one.probe is not None
    layout = plan.layouts[one.probe].outputs[one.probe_leaf]
    if one.probed is None or other.probed is None:
        return
    first = cut(one.probed, layout, one.grid, 0).double()
    second = cut(other.probed, layout, other.grid, 0).double()
    if float((first - second).norm()) > TOLERANCE_BESIDE * float(first.norm()):
        plan.coupled = (
            "a sample's gradient depends on which other sample is beside it: the loss couples "
            "samples (or dropout is on)"
        )


def _known_coupling(model: nn.Module) -> str:
    """Losses that mix samples by too little to be measured."""
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        return "output_router_logits adds a load balancing loss over the whole batch"
    return ""


def _layout(
    both: list[_Call], alone: list[list[_Call]], tolerance: float
) -> ModuleLayout | str | None:
    """What all calls of a module have in common; why there is no such thing; None: no call."""
    if not both and not any(alone):
        return None
    if any(len(calls) != len(both) for calls in alone):
        return "it is not called as often in a batch as alone"
    found: list[tuple[Layout, ...]] = []
    for part in ("inputs", "outputs"):
        seen = [getattr(call, part) for call in both]
        own = [[getattr(call, part) for call in calls] for calls in alone]
        if len({len(tensors) for tensors in [*seen, *own[0], *own[1]]}) != 1:
            return "its calls differ in their arguments"
        layouts = []
        for leaf in range(len(seen[0])):
            fitting = [
                layout
                for layout in Layout
                if all(
                    _agrees(seen[call][leaf], layout, [one[call][leaf] for one in own], tolerance)
                    for call in range(len(seen))
                )
            ]
            if not fitting:
                return f"one of its {part} does not hold the samples one after another"
            layouts.append(fitting[0])
        found.append(tuple(layouts))
    result = ModuleLayout(found[0], found[1])
    if Layout.WHOLE in [result.outputs[n] for n in both[0].floating]:
        return "its output belongs to all samples together"
    return result


def _agrees(seen: _Parts, layout: Layout, alone: list[_Parts], tolerance: float) -> bool:
    parts = seen.get(layout)
    return parts is not None and all(
        one[Layout.WHOLE][0].resembles(parts[n], parts[1 - n], tolerance)
        for n, one in enumerate(alone)
    )


def _weigh(
    plan: Plan, both: _Run, alone: list[_Run], together: Samples, places: tuple[int, ...]
) -> None:
    """Find the convention from the gradients at the probe, or say why there is none."""
    assert both.probe is not None
    layout = plan.layouts[both.probe].outputs[both.probe_leaf]
    measured, tolerance = {}, both.tolerance
    for place, one in zip(places, alone, strict=True):
        assert both.probed is not None and one.probed is not None
        own = one.probed.double().flatten()
        shared = cut(both.probed, layout, together.grid, place).double().flatten()
        size = float(own @ own)
        weight = float(own @ shared) / size if size > 0.0 else 0.0
        error = float((shared - weight * own).norm())
        if not weight > 0.0 or error > tolerance * weight * size**0.5:
            plan.coupled = (
                "a sample's gradient beside another is not its own: the loss couples samples "
                "(or dropout is on)"
            )
            return
        measured[place] = weight
    plan.conventions = matching(measured, answer_tokens(together), tolerance)
    if not plan.conventions:
        got = ", ".join(f"{weight:.4g}" for weight in measured.values())
        plan.coupled = f"the loss is no mean or sum over samples or tokens: it weighs them {got}"


# ----------------------------------------------------------------------------------------- one run


# Sketches of the two samples' parts of one tensor, for every layout that it may have.
_Parts = dict[Layout, list[Sketch]]


@dataclass
class _Call:
    inputs: list[_Parts]
    outputs: list[_Parts]
    floating: list[int]  # which of the outputs are


class _Run:
    """One forward and backward of two samples together, or of one alone."""

    def __init__(
        self,
        model: nn.Module,
        owned: Owned,
        grid: Grid,
        chosen: tuple[int, ...],
        barred: set[nn.Module],
        shares: bool,
    ) -> None:
        self._model, self.grid, self._chosen, self._barred = model, grid, chosen, barred
        self._shares = shares
        self.probe: nn.Module | None = None  # the first module called that is not barred
        parameters = {
            module: tuple(module._parameters[attribute] for attribute in names)
            for module, names in owned.items()
        }
        self._taps = Taps(parameters, self._on_call)  # type: ignore[arg-type]
        self.calls: dict[nn.Module, list[_Call]] = {}
        self.probed: Tensor | None = None  # the gradient at the probe's first call
        self.probe_leaf = 0
        self.tolerance = TOLERANCE[torch.float32]

    @property
    def readers(self) -> dict[int, set[nn.Module | None]]:
        """Who read which parameter."""
        return self._taps.readers

    def go(self, batch: Any, loss_fn: LossFunction | None, what: str, where: str) -> None:
        """Forward and backward."""
        with prepared(self._model, ()), self._taps.running():
            with self._taps.forward():
                loss = loss_of(self._model, batch, loss_fn, what=what, where=where)
            check_loss(loss, batch, what=what, where=where)
            run: Any = loss.backward
            run()

    def _on_call(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if self.probe is None and module not in self._barred:
            self.probe = module
        if self._shares:
            output = share(output, self.grid)
        results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        floating = [n for n, leaf in enumerate(results) if leaf.is_floating_point()]
        if self._taps.in_forward:
            given = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
            for n in floating:
                self.tolerance = max(self.tolerance, TOLERANCE.get(results[n].dtype, 0.0))
            self.calls.setdefault(module, []).append(
                _Call([self._see(t) for t in given], [self._see(t) for t in results], floating)
            )
        if module is self.probe and torch.is_grad_enabled() and floating:
            self.probe_leaf = floating[0]
            return self._taps.follow(output, self._take)
        return output

    def _take(self, grads: list[Tensor | None]) -> None:
        self.probed = grads[self.probe_leaf]

    def _see(self, tensor: Tensor) -> _Parts:
        parts = {
            layout: [Sketch.of(cut(tensor, layout, self.grid, n)) for n in self._chosen]
            for layout in (Layout.ROWS, Layout.FLAT)
            if fits(tensor.shape, layout, self.grid)
        }
        return {**parts, Layout.WHOLE: [Sketch.of(tensor)] * len(self._chosen)}


def share(output: Any, grid: Grid) -> Any:
    """Give every sample its own row of an output that has one row for all of them.

    Position embeddings are looked up once, [1, L, d], and added to every sample; expanded, they
    get every sample's gradient by itself.
    """
    if grid.spans or grid.rows == 1:
        return output

    def expand(leaf: Any) -> Any:
        is_shared = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1
        return leaf.expand(grid.rows, *leaf.shape[1:]) if is_shared and leaf.shape[0] == 1 else leaf

    return pytree.tree_map(expand, output)
