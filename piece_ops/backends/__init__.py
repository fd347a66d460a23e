"""Implementations of the ops, one module per device; importing this registers them."""

from __future__ import annotations

from typing import Any

from piece_ops.backends import (
    cpu,
    cpu_switch,
    cuda,
    cuda_adamw_plan,
    cuda_maxima,
    cuda_reports,
    cuda_select_topk,
    triton,
)

# Device type -> what an optimizer makes once and then calls like ``sparse_adamw_``, where steps on
# the same tensors can be had for less than single calls.
ADAMW_STEPS: dict[str, Any] = {"cuda": cuda_adamw_plan.SparseAdamwSteps}

# Device type -> what keeps scatters into the same tensors and makes two of them in one pass, where
# that can be had for less than two calls.
KEPT_SCATTERS: dict[str, Any] = {"cpu": cpu_switch.CpuScatters}

__all__ = [
    "ADAMW_STEPS",
    "KEPT_SCATTERS",
    "cpu",
    "cpu_switch",
    "cuda",
    "cuda_adamw_plan",
    "cuda_maxima",
    "cuda_reports",
    "cuda_select_topk",
    "triton",
]
