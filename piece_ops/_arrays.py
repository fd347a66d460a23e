"""What callers pass (one array, a list, a tuple or a dict of them) to lists of tensors and back.

Arrays come from any library, without a copy (``_foreign.py``); results come back arranged like
the input, each of the array type of its own entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from piece_ops._foreign import GiveBack, peculiarity, take


def _all_tensors(items: Sequence[object]) -> bool:
    return set(map(type, items)) <= {Tensor, torch.nn.Parameter}


class NamingErrors:
    """Puts the caller's names into errors of the ops, which know tensors by number only.

    ``scores[3]`` becomes ``scores['w']`` for a dict, and ``scores`` for one array. Where torch has
    refused a tensor of a kind for which there is no kernel, the error says which.
    """

    def __init__(self, arrangement: Arrangement) -> None:
        self._arrangement = arrangement

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, TypeError, RuntimeError)):
            self._arrangement.raise_named(error)


class Arrangement:
    """How the caller arranged some arrays: remembers keys and array types."""

    def __init__(self, op: str, argument: str, value: object, *, is_written: bool = False) -> None:
        self._op = op
        self._argument = argument
        self._kind: type = type(value)
        self._keys: list[Any] | None = None
        items: Sequence[Any]
        if isinstance(value, (list, tuple)):
            self._kind = list if isinstance(value, list) else tuple
            items = value
        elif isinstance(value, Mapping):
            self._kind = dict
            self._keys = list(value)
            items = list(value.values())
        else:
            self._kind = Tensor
            items = [value]
        self.tensors: list[Tensor]
        self._give_backs: list[GiveBack | None] | None = None
        if _all_tensors(items):
            self.tensors = list(items)
        else:
            taken = [
                take(op, self._name(argument, t), item, is_written=is_written)
                for t, item in enumerate(items)
            ]
            self.tensors = [tensor for tensor, _ in taken]
            self._give_backs = [give_back for _, give_back in taken]
        # What errors may be about.
        self._arguments: dict[str, Sequence[Tensor | None]] = {argument: self.tensors}

    def __len__(self) -> int:
        return len(self.tensors)

    def naming_errors(self) -> NamingErrors:
        """Put the caller's names into errors raised inside this context."""
        return NamingErrors(self)

    def raise_named(self, error: Exception) -> None:
        """Raise a better error than this one; return if there is none (`NamingErrors`)."""
        if str(error).startswith(f"piece_ops.{self._op}: "):
            if not isinstance(error, RuntimeError):
                text = re.sub(r"\b(\w+)\[(\d+)\]", self._rename, str(error))
                raise type(error)(text) from None
            return
        for argument, tensors in self._arguments.items():
            for t, tensor in enumerate(tensors):
                found = None if tensor is None else peculiarity(tensor)
                if found is not None:
                    raise TypeError(
                        f"piece_ops.{self._op}: {self._name(argument, t)} must be a dense tensor "
                        f"in memory, got {found}"
                    ) from error

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
        if self._give_backs is not None:
            for t, give_back in enumerate(self._give_backs):
                if give_back is not None and isinstance(results[t], Tensor):
                    results[t] = give_back(results[t])
        return self._arrange(results)

    def split(self, flat: Tensor, counts: Sequence[int]) -> Any:
        """Cut one result into parts of these sizes, arranged like the caller's input."""
        if len(self) == 1:
            return self.rebuild([flat])
        if self._give_backs is not None and set(self._give_backs) == {Tensor.numpy}:
            array = flat.numpy()  # cut there: a tenth of the cost
            ends = accumulate(counts, initial=0)
            return self._arrange([array[begin:end] for begin, end in pairwise(ends)])
        # "unsafe": the parts are no views to autograd, which does not know indices anyway.
        return self.rebuild(flat.unsafe_split_with_sizes(counts))

    def _arrange(self, results: list[Any]) -> Any:
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
                self._arguments[argument] = value
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
        items: Sequence[Any]
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
        tensors = [
            None
            if item is None
            else take(self._op, self._name(argument, t), item, is_written=is_written)[0]
            for t, item in enumerate(items)
        ]
        self._arguments[argument] = tensors
        return tensors

    def _mismatch(self, argument: str, wanted: str, got: str) -> str:
        return f"piece_ops.{self._op}: {argument} must be {wanted} like {self._argument}, got {got}"
