"""CUDA tensors: this build has no CUDA kernels, and says so at the first call."""

from __future__ import annotations

from typing import Any, NoReturn

from piece_ops._schema import OPS, register


def _register_missing(op: str) -> None:
    @register(op, "CUDA")
    def missing(*args: Any) -> NoReturn:
        raise NotImplementedError(
            f"piece_ops.{op}: the tensors are on a CUDA device, but this version of piece_ops "
            "has kernels for the CPU only; move the tensors with .cpu()"
        )


for _op in OPS:
    _register_missing(_op)
