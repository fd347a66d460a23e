"""Deltas and live models: everything is checked first, then everything is written in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from piece_ops._inject import is_injected
from piece_ops.delta.bits import bits, same_bits
from piece_ops.delta.fingerprint import fingerprint
from piece_ops.functional import gather, scatter_

if TYPE_CHECKING:
    from piece_ops.delta.record import Delta

Parts = Mapping[str, Tensor]


def apply_(delta: Delta, model: nn.Module, *, strict: bool) -> None:
    """See `Delta.apply_`."""
    _write(delta, model, delta.base_values, delta.values, strict, "apply_")


def revert_(delta: Delta, model: nn.Module, *, strict: bool) -> None:
    """See `Delta.revert_`."""
    _write(delta, model, delta.values, delta.base_values, strict, "revert_")


def _write(
    delta: Delta, model: nn.Module, old: Parts, new: Parts, strict: bool, function: str
) -> None:
    """Check that the model holds `old` at the delta's positions, then write `new` there."""
    where = f"piece_ops.Delta.{function}"
    weights = parameters_of(model, where)
    check_structure(delta, weights, strict, where)
    chosen = chosen_weights(delta, weights, where)
    check_held(delta, read(chosen, delta.indices), old, new, where)
    if strict:
        # An apply finds the base values in the model already.
        is_apply = old is delta.base_values
        check_fingerprint(delta, weights, {} if is_apply else delta.base_values, where)
    write(chosen, delta.indices, new)


def chosen_weights(delta: Delta, weights: Parts, where: str) -> dict[str, Tensor]:
    """The weights that the delta changes, ready to be written."""
    chosen = {name: weights[name].detach() for name in delta.indices}
    for name, weight in chosen.items():
        if not weight.is_contiguous():
            raise ValueError(
                f"{where}: changed weights must be contiguous, got strides {weight.stride()} for "
                f"{name!r}; set its data to data.contiguous() first"
            )
    return chosen


def parameters_of(model: nn.Module, where: str) -> dict[str, Tensor]:
    """The named parameters of a model that can be written, tied ones once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(is_injected(module) for module in model.modules()):
        raise ValueError(
            f"{where}: model must not be wrapped by a PieceModel, whose values would overwrite the "
            "weights; call its unload() first"
        )
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"{where}: weights must be loaded, got {name!r} on the meta device")
    return weights


def check_structure(delta: Delta, weights: Parts, strict: bool, where: str) -> None:
    """Raise ValueError unless names, shapes and dtypes are those of the delta's base model."""
    wanted = delta.shapes if strict else delta.indices
    problems = [
        (f"{name!r} is missing")
        if name not in weights
        else f"{name!r} is {_form(weights[name].shape, weights[name].dtype)} and must be "
        f"{_form(delta.shapes[name], delta.dtypes[name])}"
        for name in wanted
        if name not in weights
        or tuple(weights[name].shape) != delta.shapes[name]
        or weights[name].dtype != delta.dtypes[name]
    ]
    if strict:
        problems += [f"{name!r} is unknown" for name in weights if name not in delta.shapes]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{where}: the model must have the parameters of the delta's base model"
            f"{_called(delta.base)}, got {len(problems)} that differ: "
            f"{'; '.join(problems[:5])}{more}"
        )


def check_held(delta: Delta, held: Parts, old: Parts, new: Parts, where: str) -> None:
    """Raise ValueError unless `held` equals `old` bit for bit; the text says what it is instead."""
    if same_bits(held, old):
        return
    wrong = {name: int((bits(held[name]) != bits(old[name])).sum()) for name in held}
    wrong = {name: count for name, count in wrong.items() if count}
    listed = "; ".join(
        f"{name!r}: {count} of {delta.indices[name].numel()}"
        for name, count in list(wrong.items())[:5]
    )
    more = f"; and {len(wrong) - 5} tensors more" if len(wrong) > 5 else ""
    is_apply = old is delta.base_values
    if same_bits(held, new):
        hint = "it is applied already" if is_apply else "it is not applied"
    elif delta.parent:
        hint = (
            f"it was made on top of the delta {delta.parent[:12]}; apply deltas in the order in "
            "which they were made, revert the last one first"
        )
    else:
        hint = (
            "another model, or one that was trained or patched since; apply deltas in the order in "
            "which they were made, revert the last one first"
        )
    raise ValueError(
        f"{where}: the model must hold the {'base' if is_apply else 'changed'} values of the delta"
        f"{_called(delta.task)}, got other bits at {sum(wrong.values())} of {delta.k} coordinates, "
        f"in {len(wrong)} tensors ({listed}{more}): {hint}. Nothing was written"
    )


def check_fingerprint(delta: Delta, weights: Parts, base_values: Parts, where: str) -> None:
    """Raise ValueError unless the weights, with `base_values` put in, are the delta's base."""
    indices = {name: delta.indices[name] for name in base_values}
    if fingerprint(weights, indices, base_values) != delta.fingerprint:
        raise ValueError(
            f"{where}: the model must be the one that the delta{_called(delta.task)} was made on, "
            "got one that differs outside the delta's coordinates (its fingerprint is another "
            "one): apply deltas in the order in which they were made, revert the last one first; "
            "strict=False compares the delta's own coordinates only. Nothing was written"
        )


def read(weights: Parts, indices: Parts) -> dict[str, Tensor]:
    """The weights at the indices, each on its weight's device; one call per device."""
    found: dict[str, Tensor] = {}
    for names in _by_device(weights):
        parts = gather(
            [weights[name] for name in names],
            [indices[name].to(weights[name].device) for name in names],
        )
        found.update(zip(names, parts, strict=True))
    return {name: found[name] for name in weights}


def write(weights: Parts, indices: Parts, values: Parts) -> None:
    """Write values into weights at the indices; one call per device."""
    for names in _by_device(weights):
        scatter_(
            [weights[name] for name in names],
            [indices[name].to(weights[name].device) for name in names],
            [values[name].to(weights[name].device) for name in names],
        )


def _by_device(weights: Parts) -> list[list[str]]:
    groups: dict[torch.device, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault(weight.device, []).append(name)
    return list(groups.values())


def _called(name: str) -> str:
    return f" {name!r}" if name else ""


def _form(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
