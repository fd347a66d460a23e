"""sampled_weight_grad in NumPy, in the very order of additions that docs/contracts.md fixes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK, LANES = 256, 32


def sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """float32 throughout; NumPy rounds each product and each sum."""
    g, x = (t.detach().float().numpy() for t in (grad_output, input))
    i, j = np.divmod(indices.numpy(), max(x.shape[1], 1))
    values = np.zeros(indices.numel(), np.float32)
    with np.errstate(all="ignore"):
        for first in range(0, g.shape[0], BLOCK):
            lanes = np.zeros((LANES, len(values)), np.float32)
            for t in range(first, min(first + BLOCK, g.shape[0])):
                lanes[t % LANES] += g[t, i] * x[t, j]
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = lanes[:half] + lanes[half:]
            values += lanes[0]
    return torch.from_numpy(values)
