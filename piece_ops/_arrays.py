"""What callers pass (one array, a list, a tuple or a dict of them) to lists of tensors and back.

PyTorch tensors are taken as they are, NumPy arrays without a copy; results come back arranged
like the input and of its array type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack


def as_tensor(op: str, argument: str, value: object, *, is_written: bool) -> Tensor:
    """View one array as a tensor; never copies.

    Raises
    ------
    TypeError
        If it is neither a tensor nor a NumPy array, or of a dtype that torch does not know.
    ValueError
        If it is to be written but read-only, or has negative strides.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"piece_ops.{op}: {argument} must be a torch.Tensor or numpy.ndarray, "
            f"got {type(value).__name__}"
        )
    # Negative strides must not reach torch's readers: some of them end the process.
    if any(stride < 0 for stride in value.strides):
        raise ValueError(
            f"piece_ops.{op}: {argument} must be contiguous, got an array with strides "
            f"{value.strides}; call numpy.ascontiguousarray first if a copy is meant"
        )
    if is_written and not value.flags.writeable:
        raise ValueError(
            f"piece_ops.{op}: {argument} is written and must be writeable, got a read-only array"
        )
    try:
        # from_numpy warns about read-only arrays; DLPack lets them through, and nothing writes.
        return torch.from_numpy(value) if value.flags.writeable else from_dlpack(value)
    except (TypeError, BufferError) as error:
        raise TypeError(f"piece_ops.{op}: {argument} has dtype {value.dtype}: {error}") from error


def _all_tensors(items: Sequence[object]) -> bool:
    return set(map(type, items)) <= {Tensor, torch.nn.Parameter}


class Arrangement:
    """How the caller arranged some tensors: remembers keys and array types."""

    def __init__(self, op: str, argument: str, value: object, *, is_written: bool = False) -> None:
        self._op = op
        self._argument = argument
        self._kind: type = type(value)
        self._keys: list[Any] | None = None
        items: Sequence[object]
        if isinstance(value, Mapping):
            self._kind = dict
            self._keys = list(value)
            items = list(value.values())
        elif isinstance(value, (list, tuple)):
            self._kind = list if isinstance(value, list) else tuple
            items = value
        else:
            self._kind = Tensor
            items = [value]
        self.tensors: list[Tensor]
        if _all_tensors(items):
            self._is_numpy: list[bool] | None = None
            self.tensors = list(items)  # type: ignore[arg-type]
            return
        self._is_numpy = [isinstance(item, np.ndarray) for item in items]
        self.tensors = [
            item
            if isinstance(item, Tensor)
            else as_tensor(op, self._name(argument, t), item, is_written=is_written)
            for t, item in enumerate(items)
        ]

    def __len__(self) -> int:
        return len(self.tensors)

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Put the caller's names into errors of the ops, which know tensors by number only.

        ``scores[3]`` becomes ``scores['w']`` for a dict, and ``scores`` for one array.
        """
        try:
            yield
        except (ValueError, TypeError) as error:
            text = re.sub(r"\b(\w+)\[(\d+)\]", self._rename, str(error))
            raise type(error)(text) from None

    def _rename(self, match: re.Match[str]) -> str:
        t = int(match[2])
        return self._name(match[1], t) if t < len(self) else match[0]

    def _name(self, argument: str, t: int) -> str:
        if self._keys is not None:
            return f"{argument}[{self._keys[t]!r}]"
        return argument if self._kind is Tensor else f"{argument}[{t}]"

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Arrange results (tensors, or plain numbers) like the caller's input."""
        results = list(tensors)
        if self._is_numpy is not None:
            for t, is_numpy in enumerate(self._is_numpy):
                if is_numpy and isinstance(results[t], Tensor):
                    results[t] = results[t].numpy()
        if self._keys is not None:
            return dict(zip(self._keys, results, strict=True))
        return results[0] if self._kind is Tensor else self._kind(results)

    def match(self, argument: str, value: object, *, is_written: bool = False) -> list[Tensor]:
        """Take another argument that must be arranged like this one.

        Raises
        ------
        ValueError
            If it is arranged otherwise, or has other keys or another length.
        """
        if self._kind is list and isinstance(value, list) and _all_tensors(value):
            if len(value) == len(self):  # the usual case, at a tenth of the cost
                return value
        tensors = self.match_optional(argument, value, is_written=is_written)
        present: list[Tensor] = []
        for t, tensor in enumerate(tensors):
            if tensor is None:
                raise ValueError(
                    f"piece_ops.{self._op}: {argument} must be arranged like {self._argument}, "
                    f"got no {self._name(argument, t)}"
                )
            present.append(tensor)
        return present

    def match_optional(
        self, argument: str, value: object, *, is_written: bool = False
    ) -> list[Tensor | None]:
        """Like match, but entries may be None and keys may be missing (None then)."""
        items: Sequence[object]
        if self._keys is not None:
            if not isinstance(value, Mapping):
                raise TypeError(self._mismatch(argument, "a dict", type(value).__name__))
            known = set(self._keys)
            unknown = [key for key in value if key not in known]
            if unknown:
                raise ValueError(
                    f"piece_ops.{self._op}: {argument} must have no keys but those of "
                    f"{self._argument}, got {unknown[:3]!r}"
                )
            items = [value.get(key) for key in self._keys]
        elif self._kind is Tensor:
            if isinstance(value, (Mapping, list, tuple)):
                raise TypeError(self._mismatch(argument, "one array", type(value).__name__))
            items = [value]
        else:
            if not isinstance(value, (list, tuple)):
                raise TypeError(self._mismatch(argument, "a list", type(value).__name__))
            items = value
        if len(items) != len(self):
            raise ValueError(
                f"piece_ops.{self._op}: {argument} must have {len(self)} tensors like "
                f"{self._argument}, got {len(items)}"
            )
        return [
            item
            if item is None or isinstance(item, Tensor)
            else as_tensor(self._op, self._name(argument, t), item, is_written=is_written)
            for t, item in enumerate(items)
        ]

    def _mismatch(self, argument: str, wanted: str, got: str) -> str:
        return f"piece_ops.{self._op}: {argument} must be {wanted} like {self._argument}, got {got}"
