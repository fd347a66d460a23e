"""How far a training step raises resident memory; run by test_sampled_training.py."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piece_ops import PieceModel, Selection, SparseAdamW, _taps

WIDTH, TOKENS, K = 4096, 8, 16_000


def peak_of(step: Any) -> int:
    """Bytes by which the resident set rises at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    step()
    return max(0, status("VmHWM") - before)


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def share(dtype: torch.dtype, is_sampled: bool) -> float:
    """What a step adds to one of the frozen layer, over the weight's bytes."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
    x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    layer.requires_grad_(False)

    def frozen() -> None:
        layer(x).float().square().mean().backward()

    frozen()  # whatever is made once
    plain = peak_of(frozen)
    positions = torch.randint(WIDTH * WIDTH, (K,)).unique()
    chosen = Selection({"weight": positions}, {"weight": (WIDTH, WIDTH)}, WIDTH * WIDTH)
    if not is_sampled:
        _taps.kind_of = lambda base: None
    wrapped = PieceModel(layer, chosen)
    optimizer = SparseAdamW(wrapped.parameters(), lr=1e-3)

    def step() -> None:
        wrapped(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    rise = peak_of(step) - plain
    return rise / (WIDTH * WIDTH * dtype.itemsize)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16)
    routes = {"sampled": True, "general": False}
    found = {route: [share(d, is_sampled) for d in dtypes] for route, is_sampled in routes.items()}
    json.dump(found, sys.stdout)
