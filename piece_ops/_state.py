"""The state dict of a `PieceModel`: what training changes, and what it belongs to.

======================  =====================================================================
``values.<name>``       float32 [k_t], the trained values
``positions.<name>``    int32 (int64 from 2^31 elements on) [k_t], where they lie in the weight
``base``                uint8 [32], SHA-256 of the weights' bits at these positions when the
                        model was wrapped, parameter by parameter in the model's order (and,
                        before them, the digest of what earlier selections have changed)
``model.<buffer>``      the wrapped model's buffers: batch norms count while they train
``model.<parameter>``   dense parameters that were unfrozen; a tied one under its first name
======================  =====================================================================

The frozen weights are not in it: they are the base model's, but for the values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops._inject import Target
from piece_ops.delta.file import narrow
from piece_ops.delta.record import Delta

_WHERE = "piece_ops.PieceModel.load_state_dict"


def _base_digest(targets: list[Target], earlier: Delta | None) -> Tensor:
    sha = hashlib.sha256(b"" if earlier is None else earlier.digest.encode())
    for target in targets:
        sha.update(target.base_values.view(torch.uint8).numpy().data)
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)


def reduce_(
    state: dict[str, Any],
    prefix: str,
    model: nn.Module,
    targets: list[Target],
    earlier: Delta | None,
) -> None:
    """Turn the state dict that modules make, in place, into the one described above."""
    for key, first, parameter in _dense(model, prefix):
        if key != first or not parameter.requires_grad:
            state.pop(key, None)
    for target in targets:
        # Copies, since safetensors refuses tensors that share memory.
        positions = narrow(target.indices, tuple(target.weight.shape)).clone()
        state[f"{prefix}positions.{target.name}"] = positions
    state[f"{prefix}base"] = _base_digest(targets, earlier)


def accept(
    state: dict[str, Any],
    prefix: str,
    model: nn.Module,
    targets: list[Target],
    earlier: Delta | None,
    missing: list[str],
) -> set[str]:
    """Check a state dict before anything of it is loaded; take out what is only checked.

    A state dict of every dense weight, without positions, passes too.

    Returns
    -------
    set of str
        Dense weights that it lacks and may lack; torch is going to report them.

    Raises
    ------
    RuntimeError
        When it belongs to another selection or another base.
    """
    marks = f"{prefix}positions."
    positions = {k.removeprefix(marks): state.pop(k) for k in list(state) if k.startswith(marks)}
    found = state.pop(f"{prefix}base", None)
    if positions:
        values = {name: state.get(f"{prefix}values.{name}") for name in positions}
        _check_selection(positions, values, targets)
        if found is None or not torch.equal(found.cpu(), _base_digest(targets, earlier)):
            raise RuntimeError(
                f"{_WHERE}: the state must come from this base model, got one that had other "
                f"weights at the {sum(target.indices.numel() for target in targets)} selected "
                "coordinates when it was wrapped, or that has selected again since. Nothing was "
                "loaded"
            )
    elif any(f"{prefix}model.{target.name}" not in state for target in targets):
        missing += [f"{marks}{target.name}" for target in targets] + [f"{prefix}base"]
    absent = set()
    for key, first, parameter in _dense(model, prefix):
        if key not in state:
            if key != first and first in state:
                state[key] = state[first]
            elif key != first or not parameter.requires_grad:
                absent.add(key)
    return absent


def _dense(model: nn.Module, prefix: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Key and parameter of every dense weight, with the first key of a tied one."""
    firsts: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = f"{prefix}model.{name}"
        yield key, firsts.setdefault(id(parameter), key), parameter


def _check_selection(
    positions: dict[str, Tensor], values: dict[str, Tensor | None], targets: list[Target]
) -> None:
    here = {target.name: target.indices.cpu() for target in targets}
    problems = [f"{name!r}: no selected coordinates here" for name in positions.keys() - here]
    for name, wanted in here.items():
        given, value = positions.get(name), values.get(name)
        if given is None:
            problems.append(f"{name!r}: none of {wanted.numel()}")
        elif not torch.equal(given.cpu().to(torch.int64), wanted):
            shared = int(torch.isin(wanted, given.cpu()).sum())
            problems.append(
                f"{name!r}: {shared} of {wanted.numel()}, and {given.numel() - shared} others"
            )
        elif value is None or value.shape != wanted.shape:
            got = "none" if value is None else f"shape {list(value.shape)}"
            problems.append(f"{name!r}: values for {wanted.numel()} positions, {got}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RuntimeError(
            f"{_WHERE}: the state must hold the positions of this model's selection, got "
            f"{len(problems)} parameters that differ ({'; '.join(sorted(problems)[:5])}{more}). "
            "Nothing was loaded"
        )
