"""Values that somebody has changed, written into the weights."""

from __future__ import annotations

import torch

from piece_ops._inject import Target
from piece_ops.functional import gather, scatter_


def write_changed(targets: list[Target]) -> int:
    """See `PieceModel.sync_`."""
    stale, suspects = [], []
    for target in targets:
        if target.values._version != target.synced_version:
            stale.append(target)
        elif target.touched:
            suspects.append(target)
    if suspects:
        held = gather([t.weight for t in suspects], [t.indices for t in suspects])
        for target, now in zip(suspects, held, strict=True):
            if not torch.equal(now, target.values.to(now.dtype)):
                stale.append(target)
            target.touched = False
    if stale:
        scatter_(
            [target.weight for target in stale],
            [target.indices for target in stale],
            [target.values for target in stale],
        )
        for target in stale:
            target.mark_synced()
    return len(stale)


def check_live(targets: list[Target], where: str) -> None:
    """Raise RuntimeError when the model is unloaded or holds other weights than it was given."""
    for target in targets:
        if not target.active:
            raise RuntimeError(f"{where}: the model has been unloaded; wrap it again")
        for module, attribute in target.owners:
            if module._parameters.get(attribute) is not target.weight:
                raise RuntimeError(
                    f"{where}: the wrapped model must keep its parameters, but {target.name!r} "
                    "has been replaced; call unload() before changing the model"
                )
