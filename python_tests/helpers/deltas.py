"""Models with a trained-looking change, and damaged delta files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from piece_ops import Delta, PieceModel, Selection

from helpers.tiny_models import llama, random_positions


def select(model: nn.Module, density: float = 0.05, seed: int = 0) -> Selection:
    """Some coordinates of every parameter."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    return Selection(random_positions(model, density, seed), shapes, total, "random")


def train(model: nn.Module, seed: int = 0, density: float = 0.05, **more: Any) -> Delta:
    """Change some coordinates of the model as training would; the model holds them afterwards."""
    generator = torch.Generator().manual_seed(seed)
    wrapped = PieceModel(model, select(model, density, seed))
    with torch.no_grad():
        for values in wrapped.parameters():
            if values.requires_grad:
                values.add_(torch.randn(values.shape, generator=generator))
    delta = wrapped.delta(**more)
    wrapped.unload()
    return delta


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, kept: dict[str, torch.Tensor]) -> bool:
    """Whether every parameter holds the kept bits."""
    return all(
        torch.equal(
            p.detach().reshape(-1).view(torch.uint8), kept[name].reshape(-1).view(torch.uint8)
        )
        for name, p in model.named_parameters()
    )


def rewrite(path: Path, tensors: dict[str, Any] | None = None, **header: Any) -> None:
    """Change tensors (None removes one) or header fields (``info_<name>``) of a delta file."""
    with safe_open(path, framework="pt") as handle:
        metadata = dict(handle.metadata())
    info = json.loads(metadata["info"])
    held = load_file(path)
    for key, tensor in (tensors or {}).items():
        held[key] = tensor
        if tensor is None:
            del held[key]
    for key, value in header.items():
        if key.startswith("info_"):
            info[key.removeprefix("info_")] = value
        else:
            metadata[key] = value
    if "info" not in header:
        metadata["info"] = json.dumps(info)
    save_file(held, path, metadata=metadata)


def two_tasks(shared: bool) -> tuple[nn.Module, Delta, Delta, dict[str, torch.Tensor]]:
    """Two deltas of one base, on the same coordinates or on others, and the base itself."""
    model = llama()
    base = snapshot(model)
    first = train(model, seed=1, task="one")
    first.revert_(model)
    second = train(model, seed=1 if shared else 2, task="two")
    second.revert_(model)
    if shared:  # other values at half of them
        name = "lm_head.weight"
        second.values[name][::2] += 1.0
    return model, first, second, base
