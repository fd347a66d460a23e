"""Batches whose samples share one backward: what is learned of them, and what that covers.

A `Plan` (see `trial`) says how samples lie in the tensors of every module and which factor their
gradients need; a `BatchedPass` works by it. What no rule covers goes by the loop over single
samples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from piece_ops.importance.batched_pass import BatchedPass, Homes, refuse
from piece_ops.importance.batches import Samples
from piece_ops.importance.conventions import agree, answer_tokens, weights
from piece_ops.importance.passes import LossFunction
from piece_ops.importance.rules import Target, kind_of
from piece_ops.importance.trial import Plan, choose_pair, learn


class BatchedGradients:
    """Adds batches to accumulators; keeps what it learned about the model and its losses."""

    def __init__(self, model: nn.Module, candidates: Mapping[str, nn.Parameter]) -> None:
        self._model, self._candidates = model, candidates
        names = {id(parameter): name for name, parameter in candidates.items()}
        self._owned: dict[nn.Module, dict[str, str]] = {}
        for module in model.modules():
            own = {
                attribute: names[id(parameter)]
                for attribute, parameter in module._parameters.items()
                if id(parameter) in names
            }
            if own:
                self._owned[module] = own
        self._kinds = {module: kind_of(module) for module in self._owned}
        self._plans: dict[Any, Plan] = {}
        self.looped: dict[str, str] = {}  # parameters that go by the loop, and why
        self.touched = 0  # parameters that the last pass has added to, also when it stopped

    def add(
        self,
        samples: Samples,
        loss_fn: LossFunction | None,
        names: Collection[str],
        to: Target,
        where: str,
    ) -> bool:
        """Add a batch for some candidates, but not for those in `looped`, left to the caller.

        Returns whether any gradient arrived. Raises before anything is added where it can;
        otherwise `touched` says that it could not.
        """
        self.touched = 0
        counts = answer_tokens(samples)
        key = _kind_of_batch(self._model, samples, loss_fn)
        plan = self._plans.get(key)
        while True:
            if plan is None or not (plan.coupled or agree(plan.conventions, counts)):
                pair = choose_pair(samples)
                if pair is None:
                    return self._loop_all(
                        names, "no two samples of the batch differ and have an answer"
                    )
                plan = learn(
                    self._model, samples, pair, loss_fn, self._owned, first=to.first, where=where
                )
                self._plans[key] = plan
            if plan.coupled:
                return self._loop_all(names, plan.coupled)
            shares = weights(counts).get(plan.conventions[0])
            if shares is None or not agree(plan.conventions, counts):
                return self._loop_all(names, "its loss fits no known convention")
            for n in [n for n, share_ in enumerate(shares) if not share_]:
                refuse(self._model, samples, n, loss_fn, to.first, where)
                return self._loop_all(
                    names, f"sample {to.first + n} has no weight in its batch's loss"
                )
            homes = {name: homes for name, homes in self.homes(plan).items() if name in names}
            self.looped = self._not_covered(plan, homes)
            homes = {name: places for name, places in homes.items() if name not in self.looped}
            if not homes:
                return False
            run = BatchedPass(
                self._model, self._candidates, homes, self._kinds, plan, samples, shares, to
            )
            try:
                if run.go(loss_fn, where):
                    return run.arrived
            finally:
                self.touched = run.touched

    def _loop_all(self, names: Collection[str], why: str) -> bool:
        self.looped = dict.fromkeys(names, why)
        return False

    def _not_covered(self, plan: Plan, wanted: Homes) -> dict[str, str]:
        """Parameters that the plan leaves to the loop, and why."""
        found: dict[str, str] = {}
        for name, homes in wanted.items():
            parameter: Any = self._candidates[name]
            rules = {_rule(self._kinds[m], a) for m, a in homes if m is not None}
            trouble = [plan.trouble[m] for m, _ in homes if m in plan.trouble]
            inside = {part for m, _ in homes if m for part in m.modules() if part is not m}
            tables: list[Any] = [m for m, _ in homes if m and self._kinds[m] == "embedding"]
            if trouble:
                found[name] = trouble[0]
            elif any(module is None for module, _ in homes):
                found[name] = "another module than its own reads it"
            elif parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                found[name] = "it has gradient hooks of its own"
            elif any(table.max_norm or table.scale_grad_by_freq for table in tables):
                found[name] = "its embedding has max_norm or scale_grad_by_freq"
            elif "each" in rules and len(rules) > 1:
                found[name] = "modules of different kinds share it"
            elif any(module in inside for module, _ in homes):
                found[name] = "a module and a part of it share it"
        return found

    def homes(self, plan: Plan) -> Homes:
        """The modules, of those that own a parameter, that use it, each with its attribute.

        Those that were seen reading it; all that own it where none was seen.
        """
        found: Homes = {}
        for module, own in self._owned.items():
            for attribute, name in own.items():
                readers = plan.readers.get(id(self._candidates[name]))
                homes = found.setdefault(name, [(None, "")] if readers and None in readers else [])
                if readers is None or module in readers:
                    homes.append((module, attribute))
        return found


def _rule(kind: str, attribute: str) -> str:
    if attribute == "weight" and kind in ("linear", "transposed", "embedding"):
        return "rows" if kind == "embedding" else "product"
    return "each"


def _kind_of_batch(model: nn.Module, samples: Samples, loss_fn: LossFunction | None) -> Any:
    """What a plan depends on: not on sizes."""
    leaves, spec = pytree.tree_flatten(samples.batch)
    shape = tuple((x.dim(), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
    return loss_fn, bool(samples.grid.spans), str(spec), shape, model.training
