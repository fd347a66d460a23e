"""Gradients of chosen weights without the dense gradient: linear layers and embeddings.

The module computes with its frozen weight, so autograd has nothing to do but the gradient of the
input. The output then passes through an identity, the tap, to which the values are an input too:
backward lets the output's gradient G through as it is and makes the gradient of the values from it
and the module's input X. For a linear layer that is ``(G^T X)[indices]``, for its bias the sum of G
over the tokens, for an embedding the sum of G over the tokens that looked a row up.

X is what is kept for backward, or a copy of only those of its columns that the chosen weights use.
A copy is smaller, unless other modules keep the same X anyway: query, key and value layers share
theirs, gate and up too. So modules that may share it (one parent, one width) copy their columns
only if all these copies together stay below `MOST_COPIED` of one X; otherwise all of them keep X
itself, once. The rule looks at the selection alone: what is kept must be the same when gradient
checkpointing runs the module again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from piece_ops._inject import Target

TAP = "_piece_tap"  # in a tapped module's __dict__: its Tap
Kind = Literal["linear", "transposed", "embedding"]  # transposed: its weight is [in, out]

# Of the bytes of X. Near 1 a copy wins little and costs time, and X may be alive for a reason that
# is not seen from here (attention keeps its output).
MOST_COPIED = 0.75


@dataclass(eq=False)
class Tap:
    """What a module's forward needs to know of its chosen positions."""

    targets: dict[str, Target]  # by attribute
    is_transposed: bool  # the weight is [in, out]
    # Columns of the input to copy for backward, and the weight's positions in a weight of only
    # these columns. None: the input itself is kept.
    used: Tensor | None = None
    positions: Tensor | None = None

    def trained(self, module: nn.Module, attribute: str) -> Target | None:
        """The target of an attribute, unless it is frozen, or the parameter has been replaced."""
        target = self.targets.get(attribute)
        if target is None or not target.values.requires_grad:
            return None
        return target if module._parameters.get(attribute) is target.weight else None

    def columns(self) -> Tensor:
        """The column of the input that each chosen weight is multiplied with."""
        target = self.targets["weight"]
        stride = target.weight.shape[1]
        return target.indices // stride if self.is_transposed else target.indices % stride

    def copy_only(self, used: Tensor) -> None:
        """Keep these columns of the input, in increasing order, instead of all."""
        target = self.targets["weight"]
        stride = target.weight.shape[1]
        place = torch.searchsorted(used, self.columns())
        if self.is_transposed:
            self.positions = place * stride + target.indices % stride
        else:
            self.positions = target.indices // stride * len(used) + place
        # They are held all the time, so on the CPU in half the bytes; CUDA knows indices it has
        # seen by their tensor.
        if target.indices.device.type == "cpu" and target.weight.numel() < 2**31:
            self.positions = self.positions.int()
        self.used = used


# --------------------------------------------------------------------------------------- the taps


class _LinearTap(torch.autograd.Function):
    """Forward: y. Backward: G for y, and the gradients of the values."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor | None,
        weight_values: Tensor | None,
        weight_positions: Tensor | None,
        bias_values: Tensor | None,
        bias_positions: Tensor | None,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_positions, bias_positions)
        ctx.set_materialize_grads(False)
        ctx.is_transposed = is_transposed
        # Not y itself, which autograd would make a view that no in-place operation may touch.
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        of_weight = of_bias = None
        if grad is not None:
            x, weight_positions, bias_positions = ctx.saved_tensors
            g = _rows(grad)
            if weight_positions is not None:
                x = _rows(x.to(g.dtype))  # as the layer saw it under autocast
                pair = (x, g) if ctx.is_transposed else (g, x)
                # The op itself: its wrapper takes any array, which costs the host as much again.
                op = torch.ops.piece_ops.sampled_weight_grad
                of_weight = op(*pair, weight_positions.long())
            if bias_positions is not None:
                of_bias = g.index_select(1, bias_positions).sum(0, dtype=torch.float32)
        return grad, None, of_weight, None, of_bias, None, None


class _EmbeddingTap(torch.autograd.Function):
    """Forward: y. Backward: for a value in row v, the sum of G over the tokens with id v."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, ids: Tensor, values: Tensor, positions: Tensor, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids, positions)
        ctx.set_materialize_grads(False)
        ctx.padding = padding
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        of_values = None
        if grad is not None:
            ids, positions = ctx.saved_tensors
            of_values = _looked_up(_rows(grad), ids.flatten(), positions, ctx.padding)
        return None, None, of_values, None, None


_tap_linear: Any = _LinearTap.apply
_tap_embedding: Any = _EmbeddingTap.apply


def _rows(matrix: Tensor) -> Tensor:
    return matrix.reshape(-1, matrix.shape[-1]).contiguous()


def _looked_up(g: Tensor, ids: Tensor, positions: Tensor, padding: int | None) -> Tensor:
    """The embedding's gradient at the positions, in float32; scratch: two buffers like G."""
    if len(ids) == 0:
        return g.new_zeros(positions.shape, dtype=torch.float32)
    row, column = positions // g.shape[1], positions % g.shape[1]
    # Tokens of one id are added up at the place of the first of them in a sorted batch.
    ordered = ids.sort().values
    sums = torch.zeros_like(g, dtype=torch.float32)
    sums.index_add_(0, torch.searchsorted(ordered, ids), g.float())
    place = torch.searchsorted(ordered, row).clamp_(max=len(ids) - 1)
    is_met = ordered[place] == row
    if padding is not None:
        is_met &= row != padding
    return torch.where(is_met, sums[place, column], 0.0)


# --------------------------------------------------------------------------- forwards of modules


def kind_of(base: Any) -> Kind | None:
    """What modules of a class compute with their weight, or None where that is not known.

    The class is known by the very function that is its forward: a subclass with another one, a
    quantised layer say, may do anything with its weight. GPT-2's transposed linear layer is known
    by name, since its library is not a dependency.
    """
    forward = base.forward
    if forward is nn.Linear.forward:
        return "linear"
    if forward is nn.Embedding.forward:
        return "embedding"
    name = (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", ""))
    return "transposed" if name == ("transformers.pytorch_utils", "Conv1D.forward") else None


def why_dense(module: Any) -> str:
    """Why a module, not yet wrapped, has its weights' gradients made densely; empty: it has not."""
    kind = kind_of(type(module))
    if kind is None:
        return f"{type(module).__name__} has no forward of a linear layer or an embedding"
    if "forward" in vars(module):
        return f"the forward of this {type(module).__name__} was replaced before it was wrapped"
    if kind == "embedding" and (module.max_norm is not None or module.scale_grad_by_freq):
        return "its embedding has max_norm or scale_grad_by_freq"
    return ""


def tapped_forward(base: Any, kind: Kind) -> Callable[[Any, Tensor], Tensor]:
    """The forward of the subclass of `base`; arguments named as there."""
    plain = base.forward

    def has_tap(module: Any, x: Tensor) -> bool:
        # Not after unload, if somebody kept the bound method.
        return torch.is_grad_enabled() and TAP in module.__dict__ and not x.is_nested

    def linear(self: Any, input: Tensor) -> Tensor:
        return _linear(self, input, F.linear) if has_tap(self, input) else plain(self, input)

    def conv1d(self: Any, x: Tensor) -> Tensor:
        return _linear(self, x, _conv1d) if has_tap(self, x) else plain(self, x)

    def embedding(self: Any, input: Tensor) -> Tensor:
        return _embedding(self, input) if has_tap(self, input) else plain(self, input)

    return {"linear": linear, "transposed": conv1d, "embedding": embedding}[kind]


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.addmm(bias, x.view(-1, x.size(-1)), weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def _linear(module: Any, x: Tensor, product: Callable[..., Tensor]) -> Tensor:
    tap: Tap = module.__dict__[TAP]
    weight, bias = tap.trained(module, "weight"), tap.trained(module, "bias")
    # What has no tap here is read as ever: absent, frozen, replaced, or computed by the module.
    y = product(
        x,
        module.weight if weight is None else weight.weight,
        module.bias if bias is None else bias.weight,
    )
    if weight is None and bias is None:
        return y
    kept = positions = None
    if weight is not None:
        kept, positions = x.detach(), weight.indices
        if tap.used is not None:
            # Not index_select, which takes up to four times as long on the CPU.
            columns = kept.gather(-1, tap.used.expand(*kept.shape[:-1], -1))
            kept, positions = columns.to(y.dtype), tap.positions
    tapped: Tensor = _tap_linear(
        y,
        kept,
        None if weight is None else weight.values,
        positions,
        None if bias is None else bias.values,
        None if bias is None else bias.indices,
        tap.is_transposed,
    )
    return tapped


def _embedding(module: Any, ids: Tensor) -> Tensor:
    target = module.__dict__[TAP].trained(module, "weight")
    if target is None or module.max_norm is not None or module.scale_grad_by_freq:
        return nn.Embedding.forward(module, ids)
    y = F.embedding(ids, target.weight)
    tapped: Tensor = _tap_embedding(y, ids, target.values, target.indices, module.padding_idx)
    return tapped


# ------------------------------------------------------------------------- which columns to keep


def place_taps(targets: Iterable[Target]) -> None:
    """Give the owners that can be tapped their taps; anew whenever `indices` are replaced."""
    owners: dict[int, tuple[Any, dict[str, Target]]] = {}
    for target in targets:
        for module, attribute in target.owners:
            owners.setdefault(id(module), (module, {}))[1][attribute] = target
    siblings: dict[tuple[str, int], list[tuple[Tap, Tensor]]] = {}
    for module, by_attribute in owners.values():
        kind = kind_of(module._piece_base)
        if kind is None:
            continue
        tap = module.__dict__[TAP] = Tap(by_attribute, is_transposed=kind == "transposed")
        if "weight" in by_attribute and kind != "embedding":
            weight = by_attribute["weight"]
            parent = weight.name.rpartition(".")[0].rpartition(".")[0]
            width = weight.weight.shape[0 if tap.is_transposed else 1]
            used = torch.unique(tap.columns())
            siblings.setdefault((parent, width), []).append((tap, used))
    for (_, width), group in siblings.items():
        if sum(len(used) for _, used in group) <= MOST_COPIED * width:
            for tap, used in group:
                tap.copy_only(used)
