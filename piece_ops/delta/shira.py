"""Deltas as adapter files of PEFT's SHiRA, and back.

SHiRA adds a sparse matrix to the weight of an ``nn.Linear``: ``shira_weight`` float32 [n] at
``shira_indices`` int32 [2, n] (row, column), with n = r (rows + columns) for one r of the whole
adapter. PEFT forms ``weight + sparse`` in float32 and rounds it to the weight's dtype; so do we.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from piece_ops._files import write_atomically, write_json
from piece_ops.delta import live
from piece_ops.delta.bits import bits
from piece_ops.delta.fingerprint import fingerprint
from piece_ops.delta.record import Delta

_WEIGHTS, _CONFIG, _PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def to_shira(
    delta: Delta, model: nn.Module, folder: str | os.PathLike[str], *, skip: Iterable[str] = ()
) -> None:
    """Write a delta as a SHiRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    Parameters
    ----------
    delta : Delta
    model : nn.Module
        The base model; only the kinds of its modules are looked at.
    folder : path
        Made when it is not there.
    skip : iterable of str
        Parameters of the delta to leave out. The adapter is then not the whole delta.

    Raises
    ------
    ValueError
        When the delta changes other parameters than weights of ``nn.Linear`` (they are named; SHiRA
        has no place for them), more of one than SHiRA allows, or to or from values that are not
        finite.

    Notes
    -----
    Added values are ``value - base value`` in float32. In bfloat16 and float16 models PEFT then
    forms our values exactly; in float32 ones within 2^-24 (\\|value\\| + \\|value - base value\\|).

    SHiRA gives each layer r (rows + columns) entries with one r for all, so the layer with most
    changes decides and the others are padded with zeros: the file is larger than the delta's.
    """
    where = "piece_ops.delta.to_shira"
    skipped = set(skip)
    linear = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    names = [name for name in delta.indices if name not in skipped]
    other = [name for name in names if name not in linear]
    if other:
        raise ValueError(
            f"{where}: SHiRA holds weights of nn.Linear only, got {len(other)} other parameters: "
            f"{other[:5]}; name them in skip to leave them out"
        )
    if not names:
        raise ValueError(f"{where}: the delta must change a weight of an nn.Linear, got none")
    rank = max(-(-delta.indices[name].numel() // sum(delta.shapes[name])) for name in names)
    tensors = {}
    for name in names:
        rows, columns = delta.shapes[name]
        room = rank * (rows + columns)
        if room > rows * columns:
            raise ValueError(
                f"{where}: SHiRA needs {room} entries in every layer here (r = {rank}), got "
                f"{rows * columns} weights in {name!r}"
            )
        added = delta.values[name].cpu().float() - delta.base_values[name].cpu().float()
        if not bool(added.isfinite().all()):
            raise ValueError(
                f"{where}: changes must be finite, got {int((~added.isfinite()).sum())} of "
                f"{added.numel()} that are not in {name!r}"
            )
        positions = delta.indices[name].cpu()
        padding = room - positions.numel()
        flat = torch.cat([positions, positions.new_zeros(padding)])
        module = _PREFIX + name.removesuffix("weight").removesuffix(".")
        tensors[f"{module}.shira_weight"] = torch.cat([added, added.new_zeros(padding)])
        tensors[f"{module}.shira_indices"] = torch.stack([flat // columns, flat % columns]).int()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / _WEIGHTS, lambda file: save_file(tensors, file, {"format": "pt"}))
    config = {
        "peft_type": "SHIRA",
        "base_model_name_or_path": delta.base or None,
        "inference_mode": True,
        "r": rank,
        "target_modules": [name.removesuffix(".weight") for name in names],
        "mask_type": "random",  # only where peft puts zeros before it reads the indices
        "task_type": None,
    }
    write_json(path / _CONFIG, config)


def from_shira(
    folder: str | os.PathLike[str], model: nn.Module, *, task: str = "", base: str | None = None
) -> Delta:
    """Read a SHiRA adapter as a delta of its base model: in place it gives PEFT's logits.

    Parameters
    ----------
    folder : path
        With ``adapter_config.json`` and ``adapter_model.safetensors``.
    model : nn.Module
        The base model, without the adapter. Not changed.
    task, base : str
        Kept in the delta for information; `base` by default as the adapter says.

    Returns
    -------
    Delta
        The coordinates whose bits the adapter changes.

    Raises
    ------
    FileNotFoundError, ValueError
        When it is not a SHiRA adapter, holds anything else (``modules_to_save``), or does not fit
        the model; the tensor is named.
    """
    where = "piece_ops.delta.from_shira"
    path = Path(folder)
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{where}: {str(path)!r} must hold {file}, got none")
    try:
        config: dict[str, Any] = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
        tensors = load_file(path / _WEIGHTS)
    except (ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{where}: the adapter in {str(path)!r} is damaged: {error}") from error
    if kind != "SHIRA":
        raise ValueError(f"{where}: {str(path)!r} must hold a SHIRA adapter, got {kind!r}")
    weights = live.parameters_of(model, where)
    indices: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    base_values: dict[str, Tensor] = {}
    for name, (positions, added) in _entries(tensors, weights, where).items():
        weight = weights[name].detach()
        before = torch.take(weight, positions.to(weight.device)).cpu()
        now = (before.float() + added).to(before.dtype)
        moved = bits(now) != bits(before)
        # An added zero changes nothing (it may have turned -0 into +0).
        moved &= added != 0
        if moved.any():
            indices[name] = positions[moved]
            values[name], base_values[name] = now[moved], before[moved]
    return Delta(
        {name: indices[name] for name in weights if name in indices},
        values,
        base_values,
        {name: tuple(weight.shape) for name, weight in weights.items()},
        {name: weight.dtype for name, weight in weights.items()},
        fingerprint=fingerprint(weights, {}, {}),
        base=str(config.get("base_model_name_or_path") or "") if base is None else base,
        method="shira",
        task=task,
    )


def _entries(
    tensors: dict[str, Tensor], weights: dict[str, Tensor], where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter -> increasing flat positions and what is added there (float32)."""
    kinds = (".shira_weight", ".shira_indices")
    others = [key for key in tensors if not (key.startswith(_PREFIX) and key.endswith(kinds))]
    # When the head is a target peft also saves it, as it is in the base model.
    odd = [key for key in others if not _is_of_base(key, tensors[key], weights)]
    if odd:
        raise ValueError(f"{where}: the adapter must hold shira_* only, got {len(odd)}: {odd[:5]}")
    found = {}
    for module in dict.fromkeys(key.rpartition(".")[0] for key in tensors if key not in others):
        name = f"{module.removeprefix(_PREFIX)}.weight".removeprefix(".")
        added, places = (tensors.get(module + kind) for kind in kinds)
        if added is None or places is None:
            raise ValueError(f"{where}: {module!r} must have both of {kinds}, got one")
        if name not in weights or weights[name].dim() != 2:
            raise ValueError(f"{where}: the model must have a matrix {name!r}, got none")
        if added.dim() != 1 or tuple(places.shape) != (2, added.numel()):
            raise ValueError(
                f"{where}: indices of {name!r} must be [2, {added.numel()}], got "
                f"{list(places.shape)}"
            )
        rows, columns = weights[name].shape
        row, column = places.to(torch.int64)  # peft on Windows writes float32
        wrong = int(((row < 0) | (row >= rows) | (column < 0) | (column >= columns)).sum())
        if wrong:
            raise ValueError(
                f"{where}: indices of {name!r} must lie in {[rows, columns]}, got {wrong} of "
                f"{added.numel()} outside"
            )
        positions, slots = torch.unique(row * columns + column, return_inverse=True)
        sums = torch.zeros(positions.numel()).index_add_(0, slots, added.float())
        found[name] = positions, sums
    return found


def _is_of_base(key: str, tensor: Tensor, weights: dict[str, Tensor]) -> bool:
    """Whether a tensor of the adapter is a weight of the base model, bit for bit."""
    weight = weights.get(key.removeprefix(_PREFIX).replace(".base_layer.", "."))
    if weight is None or (weight.shape, weight.dtype) != (tensor.shape, tensor.dtype):
        return False
    return torch.equal(bits(tensor), bits(weight.detach().cpu()))
