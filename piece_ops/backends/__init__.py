"""Implementations of the ops, one module per device; importing this registers them."""

from __future__ import annotations

from piece_ops.backends import cpu, cuda, cuda_select_topk, triton

__all__ = ["cpu", "cuda", "cuda_select_topk", "triton"]
