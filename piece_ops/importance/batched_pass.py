"""One forward and backward of a batch that gives every sample's own gradients.

During backward each module's gradients are used, and what it computed from is dropped, as soon as
they are there; only parameters with several uses (tied weights, a module called twice) wait for
the end. By the rules of `rules`, as a `Plan` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from piece_ops.importance.batches import Samples
from piece_ops.importance.elementwise import agree, rows_of_tokens
from piece_ops.importance.layouts import ModuleLayout, offsets
from piece_ops.importance.passes import LossFunction, check_loss, loss_of, prepared
from piece_ops.importance.rules import (
    Each,
    NotFinite,
    Product,
    Rerun,
    Rows,
    Sums,
    Target,
    Use,
    sum_rows,
)
from piece_ops.importance.taps import Taps, Version, kept
from piece_ops.importance.trial import Plan, share

# name -> the modules that use the parameter (None: some other one), each with its attribute
Homes = dict[str, list[tuple[nn.Module | None, str]]]
_ARGUMENTS = (type(None), bool, int, float, str, torch.dtype, torch.device)  # safe to pass again


def name_sample(n: int, first: int) -> str:
    """The sample in an error's text."""
    return f"sample {first + n} (row {n} of its batch)"


def refuse(
    model: nn.Module,
    samples: Samples,
    n: int,
    loss_fn: LossFunction | None,
    first: int,
    where: str,
) -> None:
    """Raise if the loss of one sample is not finite."""
    what, part = name_sample(n, first), samples.alone[n]
    with torch.no_grad():
        loss = loss_of(model, part, loss_fn, what=what, where=where)
    check_loss(loss, part, what=what, where=where, must_depend=False)


class BatchedPass:
    """One batched forward and backward."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, nn.Parameter],
        homes: Homes,
        kinds: Mapping[nn.Module, str],
        plan: Plan,
        samples: Samples,
        shares: tuple[float, ...],
        to: Target,
    ) -> None:
        self._model, self._candidates, self._kinds = model, candidates, kinds
        self._plan, self._samples, self._to = plan, samples, to
        # The loss times `factor` sends gradients of about the size that single samples would.
        self._factor = 1.0 if shares[0] == 1.0 else float(len(shares))
        scales = torch.tensor([1.0 / (share_ * self._factor) for share_ in shares]).tolist()
        self._sums = Sums(to, scales)
        self._own: dict[nn.Module, dict[str, str]] = {}  # module -> attribute -> name
        self._homes: dict[str, list[nn.Module]] = {}
        for name, places in homes.items():
            for module, attribute in places:
                assert module is not None
                self._own.setdefault(module, {})[attribute] = name
                self._homes.setdefault(name, []).append(module)
        self._taps = Taps(
            {m: tuple(candidates[n] for n in own.values()) for m, own in self._own.items()},
            self._on_call,
        )
        self._calls: Counter[nn.Module] = Counter()
        self._trouble: dict[nn.Module, str] = {}
        self._versions: list[tuple[nn.Module, Version]] = []
        self._tokens: dict[str, list[Tensor]] = {}  # looked up in tied embeddings
        self._waiting: dict[str, list[Use]] = {}
        self.arrived = False  # any gradient
        self.touched = 0  # parameters that were added to

    def go(self, loss_fn: LossFunction | None, where: str) -> bool:
        """Run it; False when the plan turned out wrong, is corrected, and nothing was added."""
        samples, to = self._samples, self._to
        what = f"samples {to.first} to {to.first + samples.grid.count - 1}"
        with prepared(self._model, ()), self._taps.running():
            with self._taps.forward():
                loss = loss_of(self._model, samples.batch, loss_fn, what=what, where=where)
            if self._corrects_plan():
                return False
            if not bool(torch.isfinite(loss.detach())):
                for n in range(samples.grid.count):
                    refuse(self._model, samples, n, loss_fn, to.first, where)
                check_loss(loss, samples.batch, what=what, where=where, must_depend=False)
            if not loss.requires_grad:
                return True
            try:
                run: Any = loss.backward
                run(torch.full_like(loss, self._factor))
                for name in list(self._waiting):
                    self._add({name: self._waiting.pop(name)})
                to.finish()
            except NotFinite as error:
                raise ValueError(
                    f"{where}: the gradient of {name_sample(error.sample, to.first)} "
                    f"must be finite, {error}"
                ) from error
        return True

    def _corrects_plan(self) -> bool:
        """Learn from the forward what the trial did not show; whether there was anything."""
        for module, version in self._versions:
            if version.is_old:
                self._trouble[module] = "its input or output is changed in place"
        news = bool(self._trouble)
        self._plan.trouble.update(self._trouble)
        for parameter, readers in self._taps.readers.items():
            known = self._plan.readers.setdefault(parameter, set())
            news |= not readers <= known
            known |= readers
        return news

    # ------------------------------------------------------------------------- what modules do

    def _on_call(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if self._plan.shares:
            output = share(output, self._samples.grid)
        leaves, spec = pytree.tree_flatten(arguments)
        kind, layout = self._kinds[module], self._plan.layouts.get(module)
        if self._taps.in_forward:
            self._calls[module] += 1
            if why := self._misfit(kind, layout, leaves, output):
                self._trouble[module] = why
        if layout is None or module in self._trouble or not torch.is_grad_enabled():
            return output
        tensors = self._needed(kind, self._own[module], leaves)
        if self._taps.in_forward:
            # A gradient hook on a view is lost when the view is written.
            results = [r for r in pytree.tree_leaves(output) if isinstance(r, Tensor)]
            watched = [*tensors, *(result for result in results if result._is_view())]
            self._versions += [(module, Version(tensor)) for tensor in watched]
            if kind == "embedding" and len(self._homes[self._own[module]["weight"]]) > 1:
                self._tokens.setdefault(self._own[module]["weight"], []).append(tensors[0])
        box = [self._taps.keep(tensors)]  # emptied when used
        rest = leaves if kind == "module" else []
        call = _Call(module, kind, layout, [_mark(leaf) for leaf in rest], spec, _autocast(module))

        def deliver(grads: list[Tensor | None]) -> None:
            if not box:
                raise RuntimeError(
                    f"the output of a {type(module).__name__} got its gradient twice in one pass"
                )
            given = kept(box.pop())
            if any(grad is not None for grad in grads):
                with torch.no_grad(), _no_autocast(module):
                    self._use(call, given, grads)

        return self._taps.follow(output, deliver)

    def _misfit(
        self, kind: str, layout: ModuleLayout | None, leaves: list[Any], output: Any
    ) -> str:
        if layout is None:
            return "it was not called by the two samples tried first"
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if layout.misfit(given, results, self._samples.grid):
            return "the samples lie in its tensors in different ways"
        odd = [x for x in leaves if not isinstance(x, (Tensor, *_ARGUMENTS))]
        if kind == "module" and odd:
            return f"it takes a {type(odd[0]).__name__}, which running it again could change"
        return ""

    @staticmethod
    def _needed(kind: str, own: dict[str, str], leaves: list[Any]) -> list[Tensor]:
        """What the rules need of a module's arguments."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if kind == "module":
            return tensors
        return tensors[:1] if "weight" in own else []

    def _use(self, call: _Call, given: list[Tensor], grads: list[Tensor | None]) -> None:
        """Add what a call gives, or keep it until the parameter's other uses are there."""
        self.arrived = True
        ready: dict[str, list[Use]] = {}
        for name, use in self._uses(call, given, grads).items():
            homes = self._homes[name]
            if sum(self._calls[home] for home in homes) == 1:
                ready[name] = [use]
                continue
            if isinstance(use, Product) and name in self._tokens:
                products = sum(self._calls[m] for m in homes if self._kinds[m] != "embedding")
                if products == 1:
                    self.touched += 1
                    self._sums.add_product(name, use)
                    use = self._narrow(use, self._tokens[name])
            self._waiting.setdefault(name, []).append(use)
        if ready:
            self._add(ready)

    def _add(self, uses: dict[str, list[Use]]) -> None:
        self.touched += len(uses)
        each = {n: u for n, u in uses.items() if isinstance(u[0], Each)}
        with self._taps.pausing():
            self._sums.add_each(each)  # type: ignore[arg-type]
            for name in uses.keys() - each.keys():
                self._sums.add(name, uses[name])
            for name in uses:
                self._to.close(name)

    def _uses(self, call: _Call, given: list[Tensor], grads: list[Tensor | None]) -> dict[str, Use]:
        own, grid = self._own[call.module], self._samples.grid
        if call.kind == "module":
            return self._uses_of_module(call, given, grads)
        (grad,) = grads
        assert grad is not None
        bounds, tokens = offsets(grad.shape, grid), grad.reshape(-1, grad.shape[-1])
        found: dict[str, Use] = {}
        if "bias" in own:
            found[own["bias"]] = sum_rows(tokens, bounds)
        if "weight" not in own:
            return found
        (argument,) = given
        if call.kind == "embedding":
            ids = argument.expand(grad.shape[:-1]).reshape(-1)
            padding: Any = call.module.padding_idx
            if padding is not None:
                tokens = tokens.masked_fill((ids == padding)[:, None], 0.0)
            return {own["weight"]: Rows(ids, tokens, bounds)}
        inputs = argument.expand(*grad.shape[:-1], -1).reshape(-1, argument.shape[-1])
        sides = (tokens, inputs) if call.kind == "linear" else (inputs, tokens)
        found[own["weight"]] = Product(*sides, bounds)
        return found

    def _uses_of_module(
        self, call: _Call, given: list[Tensor], grads: list[Tensor | None]
    ) -> dict[str, Use]:
        """By running it again: once if its parameters are elementwise, else once a sample."""
        own, grid = self._own[call.module], self._samples.grid
        tensors = iter(given)
        leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in call.leaves]
        arguments = (leaves, call.spec)
        parameters = {name: self._candidates[name] for name in own.values()}
        again = Rerun(call.module, parameters, arguments, grads, call.layout, grid, call.context)
        alone = {name: lambda n, name=name: again.gradient(name, n) for name in parameters}
        at_once = self._each_at_once(call, leaves, grads, alone)
        return dict(at_once or {name: Each(gradient) for name, gradient in alone.items()})

    def _each_at_once(
        self,
        call: _Call,
        leaves: list[Any],
        grads: list[Tensor | None],
        alone: Mapping[str, Callable[[int], Tensor | None]],
    ) -> dict[str, Each] | None:
        """Of a module whose parameters are elementwise; None: they are not."""
        known = self._plan.elementwise
        if not known.get(call.module, True):
            return None
        with self._taps.pausing():
            own, grid = self._own[call.module], self._samples.grid
            rows = rows_of_tokens(call.module, own, (leaves, call.spec), grads, call.context)
            each = {
                name: sum_rows(found.reshape(-1, found.shape[-1]), offsets(found.shape, grid))
                for name, found in (rows or {}).items()
            }
            if call.module not in known:
                known[call.module] = rows is not None and all(
                    agree(each[name].gradient, alone[name], grid.count) for name in each
                )
        return each if known[call.module] and each else None

    @staticmethod
    def _narrow(use: Product, tokens: list[Tensor]) -> Product:
        """Only what rows of these tokens will meet: the head's gradient is as wide as the words."""
        columns = torch.unique(torch.cat([ids.reshape(-1) for ids in tokens]))
        return Product(use.left[:, columns], use.right, use.offsets, columns)


@dataclass
class _Call:
    """A module's call: all of its arguments but the tensors."""

    module: nn.Module
    kind: str
    layout: ModuleLayout
    leaves: list[Any]
    spec: Any
    context: Callable[[], Any]


_TENSOR = object()  # where an argument was a tensor


def _mark(leaf: Any) -> Any:
    return _TENSOR if isinstance(leaf, Tensor) else leaf


def _device(module: nn.Module) -> str:
    return next(module.parameters()).device.type


def _autocast(module: nn.Module) -> Callable[[], Any]:
    """The autocast state that the module runs in, to be entered again."""
    device = _device(module)
    if not torch.is_autocast_enabled(device):
        return nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype)


def _no_autocast(module: nn.Module) -> Any:
    device = _device(module)
    is_on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
