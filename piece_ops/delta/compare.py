"""The delta between two models, by exact comparison of bits, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops.delta.bits import bits
from piece_ops.delta.fingerprint import fingerprint
from piece_ops.delta.folder import Folder
from piece_ops.delta.live import parameters_of
from piece_ops.delta.record import Delta

Model = nn.Module | str | os.PathLike[str]
_CHUNK = 2**24  # elements compared at once: 16 MB of mask, whatever the tensor's size


def diff(before: Model, after: Model, *, task: str = "", base: str | None = None) -> Delta:
    """Find what differs between two models: the delta that makes the second of the first.

    Parameters
    ----------
    before, after : nn.Module, or path of a model folder or of a safetensors file
        With the same names, shapes and dtypes. Folders are read tensor by tensor. Not changed.
    task : str
        Kept in the delta for information.
    base : str, optional
        The base model's id; by default the folder, or the name that transformers loaded it by.

    Returns
    -------
    Delta
        Every coordinate whose bits differ: ``NaN`` equals itself, ``-0`` differs from ``+0``.

    Raises
    ------
    ValueError
        When names, shapes or dtypes differ; they are listed.
    TypeError
        When a tensor differs that is not float32, bfloat16, float16 or float64.

    Notes
    -----
    Cost: one read of both models. Memory: one tensor of each, and 8 bytes of position and two
    values per differing coordinate.

    Examples
    --------
    >>> import torch, piece_ops
    >>> first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> _ = second.load_state_dict(first.state_dict())
    >>> with torch.no_grad():
    ...     second.weight[1, 0] += 1.0
    >>> piece_ops.diff(first, second).indices
    {'weight': tensor([3])}
    """
    old, new = _tensors(before), _tensors(after)
    _check_same(old, new)
    indices: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    base_values: dict[str, Tensor] = {}
    shapes, dtypes = {}, {}
    for name in old:
        first, second = old[name].detach(), new[name].detach()
        shapes[name], dtypes[name] = tuple(first.shape), first.dtype
        positions = _differences(first.reshape(-1), second.reshape(-1))
        if positions.numel():
            indices[name] = positions
            base_values[name] = torch.take(first, positions.to(first.device)).cpu()
            values[name] = torch.take(second, positions.to(second.device)).cpu()
    return Delta(
        indices,
        values,
        base_values,
        shapes,
        dtypes,
        fingerprint=fingerprint(old, {}, {}),
        base=_name_of(before) if base is None else base,
        method="diff",
        task=task,
    )


def _tensors(model: Any) -> Mapping[str, Tensor]:
    if isinstance(model, (str, os.PathLike)):
        folder = Folder(model, "piece_ops.diff")
        if folder.unfinished:
            raise ValueError(
                f"piece_ops.diff: {str(model)!r} holds the files of an interrupted apply or "
                "revert; call it again first"
            )
        return folder
    return parameters_of(model, "piece_ops.diff")


def _name_of(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def _check_same(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    forms = [
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        for tensors in (old, new)
    ]
    odd = [
        f"{name!r} is {forms[0].get(name, 'missing')} and {forms[1].get(name, 'missing')}"
        for name in {**forms[0], **forms[1]}
        if forms[0].get(name) != forms[1].get(name)
    ]
    if odd:
        raise ValueError(
            "piece_ops.diff: both models must have the same names, shapes and dtypes, got "
            f"{len(odd)} that differ: {'; '.join(odd[:5])}"
        )


def _differences(first: Tensor, second: Tensor) -> Tensor:
    """Positions at which two flat tensors differ in their bits, on the CPU."""
    parts = []
    for start in range(0, first.numel(), _CHUNK):
        a, b = first[start : start + _CHUNK], second[start : start + _CHUNK]
        differ = bits(a.contiguous()) != bits(b.contiguous()).to(a.device)
        parts.append(differ.nonzero().reshape(-1).cpu() + start)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
