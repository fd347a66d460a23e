"""Deltas on disk: see docs/delta_format.md, which this module implements."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from piece_ops._files import read_tensors, write_tensors
from piece_ops.delta.fingerprint import dtype_name

if TYPE_CHECKING:
    from piece_ops.delta.record import Delta

FORMAT, VERSION = "piece_ops.delta", 2
KINDS = ("indices", "values", "base_values")
_TEXTS = ("fingerprint", "base", "method", "task", "parent", "tip")


def write(path: str | os.PathLike[str], delta: Delta) -> None:
    """Write a delta, atomically."""
    info = {**_info(delta), "sha256": digest_of(delta)}
    write_tensors(path, _tensors(delta), file_format=FORMAT, version=VERSION, info=info)


def digest_of(delta: Delta) -> str:
    """The digest that the delta's file has."""
    return _digest(_info(delta), _tensors(delta))


def _info(delta: Delta) -> dict[str, Any]:
    """The header: parameters share few forms, so each is written once and then by its number."""
    forms = {name: (dtype_name(delta.dtypes[name]), *shape) for name, shape in delta.shapes.items()}
    numbers = {form: number for number, form in enumerate(dict.fromkeys(forms.values()))}
    return {
        **{key: getattr(delta, key) for key in _TEXTS},
        "k": delta.k,
        "total": delta.total,
        "forms": [list(form) for form in numbers],
        "parameters": {name: numbers[form] for name, form in forms.items()},
    }


def _info_1(delta: Delta) -> dict[str, Any]:
    """The header in version 1 of the format."""
    return {
        **{key: getattr(delta, key) for key in _TEXTS if key != "tip"},
        "k": delta.k,
        "total": delta.total,
        "shapes": {name: list(shape) for name, shape in delta.shapes.items()},
        "dtypes": {name: dtype_name(dtype) for name, dtype in delta.dtypes.items()},
    }


def _tensors(delta: Delta) -> dict[str, Tensor]:
    """What the file holds: positions narrowed to int32 where the parameter allows it."""
    tensors = {}
    for name, positions in delta.indices.items():
        # Copies, since safetensors refuses tensors that share memory (slices of one).
        tensors[f"{name}.indices"] = narrow(positions, delta.shapes[name]).to("cpu", copy=True)
        tensors[f"{name}.values"] = delta.values[name].to("cpu", copy=True)
        tensors[f"{name}.base_values"] = delta.base_values[name].to("cpu", copy=True)
    return tensors


def narrow(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Positions as int32 where the parameter allows it: fewer than 2^31 elements."""
    return positions.to(torch.int32) if math.prod(shape) < 2**31 else positions


def _digest(info: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    sha.update(json.dumps(info, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        sha.update(f"\n{key}\t{dtype_name(tensor.dtype)}\t{tensor.numel()}\n".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read(path: str | os.PathLike[str], make: Callable[..., Delta]) -> Delta:
    """See `Delta.load`; `make` is the class."""
    where = "piece_ops.Delta.load"
    info, keys, read_one, version = read_tensors(
        path, file_format=FORMAT, version=VERSION, where=where, older=(1,)
    )
    is_old = version == 1
    problem = f"{where}: the header of {str(path)!r} is incomplete"
    shapes, dtypes, texts = _header(info, is_old, problem)
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    # safetensors keeps no order; the model's order is that of the shapes.
    places = {name: place for place, name in enumerate(shapes)}
    try:
        for key in sorted(keys, key=lambda key: places.get(key.rpartition(".")[0], -1)):
            name, _, kind = key.rpartition(".")
            if kind not in parts:
                raise ValueError(
                    f"tensors must be named <parameter>.{'|'.join(KINDS)}, got {key!r}"
                )
            tensor = read_one(key)
            if kind == "indices":
                if tensor.dtype not in (torch.int32, torch.int64):
                    raise ValueError(f"{key!r} must be int32 or int64, got {tensor.dtype}")
                tensor = tensor.to(torch.int64)
            parts[kind][name] = tensor
        delta = make(**parts, shapes=shapes, dtypes=dtypes, **texts)
        for count in ("k", "total"):
            if info.get(count) != getattr(delta, count):
                raise ValueError(
                    f"{count} must be {getattr(delta, count)} like the content, got "
                    f"{info.get(count)!r} in the header"
                )
        found = _digest(_info_1(delta), _tensors(delta)) if is_old else delta.digest
        if info.get("sha256") != found:
            raise ValueError(
                f"the SHA-256 of its content must be {info.get('sha256')}, got {found}"
            )
        if is_old:  # the name by which its children know it
            object.__setattr__(delta, "_digest", found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {str(path)!r} is damaged: {error}") from error
    return delta


def _header(
    info: dict[str, Any], is_old: bool, problem: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype], dict[str, str]]:
    """Shapes, dtypes and texts of the header, in their types."""
    try:
        if is_old:
            named = {name: (info["dtypes"][name], *shape) for name, shape in info["shapes"].items()}
            info = {**info, "tip": ""}
        else:
            named = {name: info["forms"][number] for name, number in info["parameters"].items()}
        shapes = {name: tuple(form[1:]) for name, form in named.items()}
        dtypes = {name: getattr(torch, form[0]) for name, form in named.items()}
        texts = {key: info[key] for key in _TEXTS}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{problem}: {error!r}") from error
    for name, shape in shapes.items():
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{problem}: the shape of {name!r} is {list(shape)}")
    for name, dtype in dtypes.items():
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{problem}: the dtype of {name!r} is {named[name][0]!r}")
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{problem}: {key} is {text!r}")
    return shapes, dtypes, texts
