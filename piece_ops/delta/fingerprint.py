"""What identifies a base model: its parameters' names, shapes, dtypes and a sample of its content.

A hash of every weight would cost one read of the model at every apply (135 M bfloat16 weights:
132 ms); this one reads at most 1024 elements of each parameter (3 ms) and all of the small ones.
The safety of an apply does not rest on it: the weights at the delta's own coordinates are compared
bit for bit. The fingerprint tells models that differ elsewhere, and deltas applied out of order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLE = 1024


def stride_of(numel: int) -> int:
    """Distance of the sampled positions 0, s, 2 s, ...; odd, so that no column is favoured."""
    return -(-numel // SAMPLE) | 1


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def fingerprint(
    tensors: Mapping[str, Tensor], indices: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> str:
    """The fingerprint that `tensors` would have with `values` at `indices`; nothing is written.

    So the fingerprint of a base model can be taken from the trained one. SHA-256 over, for each
    name in sorted order, the line ``<name> TAB <dtype> TAB <dims, comma-separated> LF`` and the
    bytes of the sampled elements; 64 hexadecimal digits.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        dims = ",".join(map(str, tensor.shape))
        sha.update(f"{name}\t{dtype_name(tensor.dtype)}\t{dims}\n".encode())
        stride = stride_of(tensor.numel())
        sample = _bytes_of(tensor.reshape(-1)[::stride].to("cpu", copy=True))
        if name in indices:
            positions = indices[name].cpu().numpy()
            hit = positions % stride == 0
            sample[positions[hit] // stride] = _bytes_of(values[name].cpu())[hit]
        sha.update(sample.data)
    return sha.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """The bytes of a flat tensor as an array of shape [elements, bytes of one], without a copy."""
    return tensor.view(torch.uint8).numpy().reshape(tensor.numel(), tensor.element_size())
