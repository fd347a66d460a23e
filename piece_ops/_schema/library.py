"""The torch.library of all ops, and how a fake kernel or a backend is registered with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

LIBRARY: Any = torch.library.Library("piece_ops", "DEF")  # type: ignore[no-untyped-call]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def register_fake(op: str) -> Callable[[_Function], _Function]:
    """Decorator: what an op returns, from shapes and dtypes alone."""

    def decorate(function: _Function) -> _Function:
        torch.library.register_fake(f"piece_ops::{op}", function, lib=LIBRARY)
        return function

    return decorate


def register(op: str, device: str) -> Callable[[_Function], _Function]:
    """Decorator: the implementation of an op on a device ("CPU", "CUDA")."""

    def decorate(function: _Function) -> _Function:
        LIBRARY.impl(op, function, device)
        return function

    return decorate
