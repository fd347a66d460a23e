"""Bytes that tensors take, as torch's dispatcher sees them: each new storage, until it is freed.

Scratch inside an operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages that operations make while the mode is on.

    Parameters
    ----------
    *known : Tensor
        Their storages are none of the new ones.
    counts : callable, optional
        ``counts(operation, bytes)``: whether a new storage enters `live` and `peak`; all do.

    Attributes
    ----------
    made : list of (str, shape, int)
        The operation, the shape of its result and the bytes of the new storage, in order.
    live, peak : int
        Bytes alive now and at most; what was there before counts zero, also when it is freed.
    """

    def __init__(self, *known: Tensor, counts: Callable[[str, int], bool] | None = None) -> None:
        super().__init__()
        self._counts = counts
        self.made: list[tuple[str, tuple[int, ...], int]] = []
        self.live = self.peak = 0
        self._known = {_key(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self._known:
                self._count(str(func), tensor)
        return result

    def _count(self, name: str, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        n_bytes = storage.nbytes()
        self.made.append((name, tuple(tensor.shape), n_bytes))
        self._known.add(key)
        if self._counts is not None and not self._counts(name, n_bytes):
            n_bytes = 0
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, n_bytes)

    def _freed(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.live -= n_bytes


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
