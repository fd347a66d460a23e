"""Comparison by bits: NaN equals itself, -0 does not equal +0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view(_AS_INTEGER[tensor.element_size()])


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two dicts with the same names and shapes hold the same bits, wherever they lie."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in first.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    return all(  # concatenated: one comparison, and on a GPU one wait, instead of one a tensor
        torch.equal(
            bits(torch.cat([first[name] for name in names])),
            bits(torch.cat([second[name] for name in names]).to(device)),
        )
        for (device, _), names in groups.items()
    )
