"""What a `PieceModel` makes of a model and a selection: targets, their values, a forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops._inject import Target, is_injected, owners_of
from piece_ops.functional import gather
from piece_ops.importance.candidates import DTYPES
from piece_ops.selection import Selection


class Forward:
    """Calls a model, with the signature of its forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class ValueTree(nn.Module):
    """Parameters under dotted names: ``values.model.layers.0.mlp.up_proj.weight``."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                # Written directly: a module may bear a name ("type") that register_module refuses.
                node = node._modules.setdefault(part, ValueTree({}))  # type: ignore[assignment]
            node._parameters[leaf] = parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTree:
        def keep_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype != torch.float32 else result

        base: Any = super()
        base._apply(keep_float32, recurse)
        return self


def make_targets(model: nn.Module, selection: Selection, where: str) -> list[Target]:
    """Check everything there is to check; changes nothing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(selection, Selection):
        raise TypeError(f"{where}: selection must be a Selection, got {type(selection).__name__}")
    if any(is_injected(module) for module in model.modules()):
        raise ValueError(
            f"{where}: model must not be wrapped already, got one that is; call its unload() first"
        )
    if selection.k == 0:
        raise ValueError(f"{where}: selection must hold at least one coordinate, got none")
    selection.check_fits(model)
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if name in selection.indices]
    owners = owners_of(model, names)
    for name in names:
        weight = parameters[name]
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"{where}: selected weights must be float32, bfloat16 or float16, got "
                f"{weight.dtype} for {name!r}"
            )
        if not weight.is_contiguous():
            raise ValueError(
                f"{where}: selected weights must be contiguous, got strides {weight.stride()} for "
                f"{name!r}; set its data to data.contiguous() first"
            )
        for module, _ in owners[name]:
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"{where}: modules must be Python modules, got a ScriptModule for {name!r}"
                )
    indices = [selection.indices[name].to(parameters[name].device) for name in names]
    weights = [parameters[name].detach() for name in names]
    targets = []
    for name, positions, held in zip(names, indices, gather(weights, indices), strict=True):
        master = nn.Parameter(held.to(torch.float32, copy=True))
        target = Target(name, parameters[name], positions, master, owners[name], held.cpu())
        target.mark_synced()
        targets.append(target)
    return targets
