"""Parameters that enter a result element by element (as in a norm): all samples at once.

Where y = f(x, w) uses entry j of a parameter for entry j of every token alone, a copy of the
parameter for every token changes nothing but its gradient, which then has a row a token. A sample's
gradient is the sum of its rows: one run of the module instead of one a sample. That a module is of
this kind is not assumed: `agree` compares with runs on single samples, once a module and plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Largest difference, relative to the gradient's norm, between a sample's rows added up and its own
# run. Both are rounded: in half precision, single runs round the sum as well.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


def rows_of_tokens(
    module: nn.Module,
    own: Mapping[str, str],
    arguments: tuple[list[Any], Any],
    grads: Sequence[Tensor | None],
    context: Callable[[], Any],
) -> dict[str, Tensor] | None:
    """The gradient's row for every token, [..., features], by parameter; None: not of this kind.

    `own`: attributes of the parameters, with their names; `arguments`: leaves and spec of the call.
    """
    grad = grads[0] if len(grads) == 1 else None
    if grad is None or any(module._parameters[a].shape != grad.shape[-1:] for a in own):  # type: ignore[union-attr]
        return None
    leaves, spec = arguments
    args, kwargs = pytree.tree_unflatten([_detach(leaf) for leaf in leaves], spec)
    normed = None if "forward" in vars(module) else _NORMED.get(type(module).forward)
    if normed is not None:
        return _of_norm(normed, module, own, args[0] if args else kwargs["input"], grad)
    try:
        with context(), torch.enable_grad(), _a_copy_a_token(module, own, grad.shape) as copies:
            results = pytree.tree_leaves(module.forward(*args, **kwargs))
            (result,) = results
            if result.shape != grad.shape or not result.requires_grad:
                return None
            found = torch.autograd.grad(
                result, list(copies.values()), grad.to(result.dtype), allow_unused=True
            )
    except (RuntimeError, ValueError, TypeError, IndexError):  # it wants its parameter's own shape
        return None
    if any(rows is None for rows in found):
        return None
    return dict(zip(copies, found, strict=True))


def agree(
    summed: Callable[[int], Tensor | None], alone: Callable[[int], Tensor | None], count: int
) -> bool:
    """Whether every sample's rows add up to what its own run gives."""
    for n in range(count):
        own, got = alone(n), summed(n)
        if own is None or got is None or own.shape != got.shape:
            return False
        size = float(own.double().norm())
        if not float((got.double() - own.double()).norm()) <= TOLERANCE[own.dtype] * size:
            return False
    return True


def _of_norm(
    normed: Callable[[Any, Tensor], Tensor],
    module: nn.Module,
    own: Mapping[str, str],
    x: Tensor,
    grad: Tensor,
) -> dict[str, Tensor]:
    """y = normed(x) w + b, in float32."""
    exact = grad.float()
    made = {"bias": lambda: exact, "weight": lambda: exact * normed(module, x)}
    return {name: made[attribute]() for attribute, name in own.items()}


def _layer_normed(module: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), module.normalized_shape, None, None, module.eps)


def _rms_normed(module: Any, x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return F.rms_norm(x.float(), module.normalized_shape, None, eps)


# torch's own norms, by their very forwards: their kernels take one weight only.
_NORMED: dict[Any, Callable[[Any, Tensor], Tensor]] = {
    nn.LayerNorm.forward: _layer_normed,
    nn.RMSNorm.forward: _rms_normed,
}


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


@contextmanager
def _a_copy_a_token(
    module: nn.Module, own: Mapping[str, str], shape: torch.Size
) -> Iterator[dict[str, Tensor]]:
    """The module's parameters, by name, expanded and requiring grad, in their places."""
    places: dict[str, Any] = module._parameters
    before = {attribute: places[attribute] for attribute in own}
    copies = {a: p.detach().expand(shape).requires_grad_(True) for a, p in before.items()}
    try:
        places.update(copies)
        yield {own[attribute]: copy for attribute, copy in copies.items()}
    finally:
        places.update(before)
