"""Exact per-sample gradients of parameters, from what their modules computed and were sent back.

Every call of a module gives each of its parameters one *use*; the gradient of a sample is the sum
over all uses of the parameter (tied weights, a module called several times) before it is squared:

- `Product`, the weight of a linear layer: G_n^T X_n, by `accumulate_per_sample_squares_`;
- `Rows`, the weight of an embedding: rows of G, added up by token;
- `Each`, anything else: a bias sums rows of G, and so does what enters element by element (see
  `elementwise`), for all samples at once; other parameters get their gradient from their own
  module, run again on one sample's part after another's (`Rerun`).

With H_n from products and E_n from rows, (H_n + E_n)^2 = H_n^2 + 2 H_n E_n + E_n^2, where E_n is
zero but for the rows of the sample's own tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from piece_ops._taps import kind_of as kind_of_class
from piece_ops.backends import cpu
from piece_ops.functional import accumulate_per_sample_squares_, accumulate_squares_, total
from piece_ops.importance.batches import Grid
from piece_ops.importance.candidates import Rows as RowRange
from piece_ops.importance.layouts import ModuleLayout, cut
from piece_ops.importance.on_device import OnDevice


def _are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether the float64 sum of each is finite; on a GPU with one wait for all of them."""
    if not tensors or not tensors[0].is_cuda:
        return [math.isfinite(total(tensor)) for tensor in tensors]
    sums = [t.sum(dtype=torch.float64).to(tensors[0].device) for t in tensors]
    return [math.isfinite(value) for value in torch.stack(sums).tolist()]


def kind_of(module: nn.Module) -> str:
    """Which rule a module's own parameters follow: linear, transposed, embedding or module.

    A subclass that computes in its own way, or an instance whose forward was replaced, is treated
    like any other module.
    """
    kind = None if "forward" in vars(module) else kind_of_class(type(module))
    return kind or "module"


@dataclass
class Product:
    """Sample n's gradient is left_n^T right_n; both [tokens, features]."""

    left: Tensor
    right: Tensor
    offsets: Tensor
    columns: Tensor | None = None  # added up already, and left narrowed to these columns


@dataclass
class Rows:
    """Sample n's gradient has the rows of `grad` [tokens, features] added up at rows `ids`."""

    ids: Tensor
    grad: Tensor
    offsets: Tensor


@dataclass
class Each:
    """Sample n's gradient is `gradient(n)`; None: zero. `rows`: all of them, if they are there."""

    gradient: Callable[[int], Tensor | None]
    rows: Tensor | None = None


Use = Product | Rows | Each


class Rerun:
    """A module run again on one sample's part of its arguments, for its parameters' gradients."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arguments: tuple[list[Any], Any],
        grads: Sequence[Tensor | None],
        layout: ModuleLayout,
        grid: Grid,
        context: Callable[[], Any],
    ) -> None:
        self._module, self._parameters = module, parameters
        self._leaves, self._spec = arguments
        self._grads, self._layout, self._grid = grads, layout, grid
        self._context = context
        self._last: tuple[int, dict[str, Tensor | None]] = (-1, {})

    def gradient(self, name: str, sample: int) -> Tensor | None:
        """One parameter's gradient; all of the sample's are computed together."""
        if self._last[0] != sample:
            self._last = sample, self._run(sample)
        return self._last[1][name]

    def _run(self, sample: int) -> dict[str, Tensor | None]:
        layouts = iter(self._layout.inputs)
        leaves = [
            cut(leaf.detach(), next(layouts), self._grid, sample)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in self._leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        with self._context(), torch.enable_grad(), _requiring_grad(self._parameters.values()):
            output = self._module.forward(*args, **kwargs)
            results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            pairs = [
                (result, cut(grad, layout, self._grid, sample).to(result.dtype))
                for result, grad, layout in zip(
                    results, self._grads, self._layout.outputs, strict=True
                )
                if grad is not None and result.requires_grad
            ]
            found: Sequence[Tensor | None] = [None] * len(self._parameters)
            if pairs:
                found = torch.autograd.grad(
                    [result for result, _ in pairs],
                    list(self._parameters.values()),
                    [grad for _, grad in pairs],
                    allow_unused=True,
                )
        return dict(zip(self._parameters, found, strict=True))


@contextmanager
def _requiring_grad(parameters: Any) -> Iterator[None]:
    chosen = list(parameters)
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)


def sum_rows(grad: Tensor, bounds: Tensor) -> Each:
    """The gradient of a bias: the sum over a sample's tokens, in float32."""
    places = list(itertools.pairwise(bounds.tolist()))
    lengths = {end - begin for begin, end in places}
    if len(lengths) == 1:  # all at once
        by_sample = grad.reshape(len(places), lengths.pop(), grad.shape[-1])
        rows = by_sample.sum(1, dtype=torch.float32)
    else:
        rows = torch.stack([grad[i:j].sum(0, dtype=torch.float32) for i, j in places])
    return Each(rows.__getitem__, rows)


# --------------------------------------------------------------------------------------- adding up


class Target:
    """Where gradients go, parameter by parameter.

    With `once` every parameter is closed for good after one batch, so there is no second pass over
    single samples for what the rules do not cover.
    """

    once = False

    def __init__(
        self,
        square_sums: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        first: int,
        is_reference: bool = False,
        on_device: OnDevice | None = None,
        rows: Mapping[str, RowRange] | None = None,
    ) -> None:
        self._square_sums, self._sums = square_sums, sums
        self.on_device = on_device
        self.rows = rows or {}  # of these parameters, only such rows are wanted
        # `first` is the number of the next batch's first sample; `sample` that under way.
        self.first, self.sample, self.is_reference = first, first, is_reference
        self._overflowed: set[str] = set()
        self._unread: set[str] = set()  # what added to them did not tell whether they overflowed

    def open(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """The float32 accumulators of squares and of gradients, of those that are wanted."""
        return self._square_sums.get(name), self._sums.get(name)

    def close(self, name: str) -> None:
        """The batch's gradients of the parameter are all in."""

    def note(self, name: str, overflowed: bool | None) -> None:
        """Whether an accumulator that was added to is not finite now; None: nobody looked."""
        if overflowed is None:
            self._unread.add(name)
        elif overflowed:
            self._overflowed.add(name)

    def overflowed(self, names: Iterable[str]) -> str | None:
        """The first of these parameters whose accumulators are not finite any more.

        Finite factors may have a product or a square that is not. Products say so where they are
        added; of the rest the accumulators are read once and added up in float64, which finite
        ones cannot overflow.
        """
        both = (self._square_sums, self._sums)
        held = [(n, of[n]) for n in names if n in self._unread for of in both if n in of]
        finite = _are_finite([sums for _, sums in held])
        found = {n for (n, _), is_finite in zip(held, finite, strict=True) if not is_finite}
        found |= self._overflowed
        return next((name for name in names if name in found), None)

    def add(self, name: str, grad: Tensor, sample: int | None = None) -> None:
        """Add one gradient and its square; ValueError, here or in `finish`, if not finite."""
        squares, sums = self.open(name)
        self.note(name, None)
        if name in self.rows:
            grad = grad[slice(*self.rows[name])]
        if self.on_device is not None and self.on_device.add((name, sample), squares, grad, sums):
            return
        accumulate_squares_(
            None if squares is None else {name: squares},
            {name: grad},
            None if sums is None else {name: sums},
        )

    def finish(self) -> None:
        """After a backward: raise what was left to be raised (on a GPU, one wait for all of it)."""
        found = None if self.on_device is None else self.on_device.first_bad()
        if found is not None:
            raise NotFinite(found[0], found[1] or 0)

    def take(self, name: str, grad: Tensor) -> None:
        """Add the only gradient that a backward has for a parameter."""
        self.add(name, grad)
        self.close(name)


@dataclass(frozen=True)
class Sums:
    """Adds samples' gradients, each times its factor."""

    to: Target
    scales: list[float]

    @property
    def _factors(self) -> Tensor | None:
        """The scales, as the op takes them."""
        plain = all(scale == 1.0 for scale in self.scales)
        return None if plain else torch.tensor(self.scales)

    def add(self, name: str, uses: Sequence[Use]) -> None:
        """Add one parameter's gradients, complete."""
        each = [use for use in uses if isinstance(use, Each)]
        if each:
            self.add_each({name: each})
            return
        products = [use for use in uses if isinstance(use, Product)]
        rows = [use for use in uses if isinstance(use, Rows)]
        if products:
            joined = _join_products(products)
            if joined.columns is None:
                self.add_product(name, joined)
            if rows:
                self.add_rows(name, _join_rows(rows), joined)
        else:
            self.add_rows(name, _join_rows(rows), None)

    def add_product(self, name: str, use: Product) -> None:
        """Products alone; `add_rows` adds what they and rows have together."""
        squares, sums = self.to.open(name)
        left = use.left
        if name in self.to.rows:
            left = left[:, slice(*self.to.rows[name])]
        arguments = (
            squares,
            _dense_features(left),
            _dense_features(use.right),
            use.offsets,
            sums,
            self._factors,
        )
        overflowed = None
        if self.to.on_device is None or not self.to.on_device.add_product(name, *arguments):
            try:
                if use.left.device.type == "cpu":
                    overflowed = cpu.add_per_sample_squares(*arguments)
                else:
                    accumulate_per_sample_squares_(*arguments)
            except ValueError:  # nothing was added; of which sample a factor is not finite
                for tensor in (use.left, use.right):
                    self._check(name, tensor, use.offsets)
                raise
        self.to.note(name, overflowed)

    def add_rows(self, name: str, use: Rows, product: Product | None) -> None:
        """Rows, and twice the rows times the products of the same parameter."""
        if self.to.on_device is None or not self.to.on_device.check(name, use.grad, use.offsets):
            self._check(name, use.grad, use.offsets)
        square_sums, sums = self.to.open(name)
        rows = self.to.rows.get(name)
        self.to.note(name, None)
        for n, (first, end) in enumerate(itertools.pairwise(use.offsets.tolist())):
            ids, places = torch.unique(use.ids[first:end], return_inverse=True)
            part = use.grad.new_zeros((ids.numel(), use.grad.shape[1]), dtype=torch.float32)
            part.index_add_(0, places, use.grad[first:end].float()).mul_(self.scales[n])
            other = None
            if product is not None and square_sums is not None:
                other = _product_rows(product, n, ids).mul_(self.scales[n])
            if rows is not None:  # of all of them, as ever: a product's bits depend on its shape
                own = (ids >= rows[0]) & (ids < rows[1])
                ids, part = ids[own] - rows[0], part[own]
                other = None if other is None else other[own]
            if sums is not None:
                sums.index_add_(0, ids, part)
            if square_sums is None:
                continue
            squares = part * part
            if other is not None:
                squares.add_(part.mul_(other), alpha=2.0)
            # A square of (rows + product) is not negative; the sum of its rounded terms could be.
            square_sums[ids] = (square_sums[ids] + squares).clamp_(min=0.0)

    def add_each(self, uses: Mapping[str, Sequence[Each]]) -> None:
        """One sample after another; the parameters of one module together."""
        alone = {name: parts for name, parts in uses.items() if not self._add_rows_of(name, parts)}
        for n, scale in enumerate(self.scales):
            for name, parts in alone.items():
                found = [grad for use in parts if (grad := use.gradient(n)) is not None]
                if not found:
                    continue
                grad = found[0].float() if scale == 1.0 else found[0].float() * scale
                for more in found[1:]:
                    grad = grad + more.float() * scale
                try:
                    self.to.add(name, grad.contiguous(), n)
                except ValueError as error:
                    raise NotFinite(name, n) from error

    def _add_rows_of(self, name: str, parts: Sequence[Each]) -> bool:
        """Add all samples in one call, as products of ones and their gradients, if they are there.

        Sample by sample, 8 of them and SmolLM2's 61 norms took 488 calls, 2 to 4 % of a pass. On a
        GPU it stays so: there the products are made for matrices. False: nothing was added.
        """
        rows = [use.rows for use in parts if use.rows is not None]
        if len(rows) < len(parts) or rows[0].device.type != "cpu":
            return False
        if self.to.on_device is not None and self.to.on_device.takes(rows[0]):  # an emulated one
            return False
        grads = sum(rows[1:], start=rows[0])
        count, width = grads.shape
        one, each = grads.new_ones((count, 1)), torch.arange(count + 1)
        squares, sums = (t if t is None else t.view(1, width) for t in self.to.open(name))
        try:
            overflowed = cpu.add_per_sample_squares(squares, one, grads, each, sums, self._factors)
        except ValueError:  # nothing was added
            self._check(name, grads, each)
            raise
        self.to.note(name, overflowed)
        return True

    def _check(self, name: str, tensor: Tensor, bounds: Tensor) -> None:
        """Raise for the first sample with a NaN or an infinity."""
        if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            return
        for n, (first, end) in enumerate(itertools.pairwise(bounds.tolist())):
            if not bool(torch.isfinite(tensor[first:end]).all()):
                raise NotFinite(name, n)


class NotFinite(ValueError):
    """A gradient that is NaN or infinite: of which parameter, from which sample of the batch."""

    def __init__(self, name: str, sample: int) -> None:
        super().__init__(f"got NaN or infinity for {name!r}")
        self.sample = sample


def _dense_features(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _join_products(uses: Sequence[Product]) -> Product:
    if len(uses) == 1:
        return uses[0]
    left, bounds = _interleave([(use.left, use.offsets) for use in uses])
    right, _ = _interleave([(use.right, use.offsets) for use in uses])
    return Product(left, right, bounds)


def _join_rows(uses: Sequence[Rows]) -> Rows:
    if len(uses) == 1:
        return uses[0]
    ids, bounds = _interleave([(use.ids, use.offsets) for use in uses])
    grad, _ = _interleave([(use.grad, use.offsets) for use in uses])
    return Rows(ids, grad, bounds)


def _interleave(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All tokens of sample 0 from every part, then of sample 1, and so on."""
    pieces = [
        tensor[first:end]
        for pairs in zip(*[itertools.pairwise(bounds.tolist()) for _, bounds in parts], strict=True)
        for (tensor, _), (first, end) in zip(parts, pairs, strict=True)
    ]
    bounds = torch.stack([bounds for _, bounds in parts]).sum(0)
    kind = torch.promote_types(parts[0][0].dtype, parts[-1][0].dtype)
    return torch.cat([piece.to(kind) for piece in pieces]), bounds


def _product_rows(use: Product, sample: int, ids: Tensor) -> Tensor:
    """The rows `ids` of one sample's product."""
    first, end = use.offsets[sample : sample + 2].tolist()
    columns = ids if use.columns is None else torch.searchsorted(use.columns, ids)
    return use.left[first:end, columns].float().T @ use.right[first:end].float()
