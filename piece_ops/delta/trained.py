"""The delta of a model that a `PieceModel` trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from piece_ops._inject import Target
from piece_ops.delta.bits import bits
from piece_ops.delta.fingerprint import fingerprint
from piece_ops.delta.live import read
from piece_ops.delta.record import Delta


@torch.no_grad()
def delta_of(
    model: nn.Module,
    targets: Iterable[Target],
    *,
    changed_only: bool,
    base: str | None,
    method: str,
    task: str,
    parent: str | Delta,
) -> Delta:
    """See `PieceModel.delta`; the weights must hold the trained values already."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    by_name = {target.name: target for target in targets}
    for name, target in by_name.items():
        if target.weight.dtype != target.base_values.dtype:
            raise ValueError(
                "piece_ops.PieceModel.delta: weights must keep the dtype that they had when the "
                f"model was wrapped, {target.base_values.dtype}, got {target.weight.dtype} for "
                f"{name!r}: rounding has changed all of them"
            )
    chosen = {name: weights[name].detach() for name in by_name}
    held = read(chosen, {name: target.indices for name, target in by_name.items()})
    indices, values, base_values = {}, {}, {}
    for name, target in by_name.items():
        positions, now, before = target.indices.cpu(), held[name].cpu(), target.base_values
        if changed_only:
            moved = bits(now) != bits(before)
            positions, now, before = positions[moved], now[moved], before[moved]
        if positions.numel():
            indices[name], values[name], base_values[name] = positions, now, before
    if base is None:
        base = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return Delta(
        indices,
        values,
        base_values,
        shapes={name: tuple(weight.shape) for name, weight in weights.items()},
        dtypes={name: weight.dtype for name, weight in weights.items()},
        fingerprint=fingerprint(weights, indices, base_values),
        base=base,
        method=method,
        task=task,
        parent=parent.digest if isinstance(parent, Delta) else parent,
    )
