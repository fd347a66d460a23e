"""Which parameters of a model may be selected, and how many parameters it has in all.

Rules (the same for every method):

- a parameter is known by its first name in ``model.named_parameters()``; tied weights are one;
- a frozen parameter (``requires_grad=False``) is no candidate;
- the weights of ``nn.Embedding`` and ``nn.EmbeddingBag`` (and so an output head tied to one) are
  no candidates unless asked for;
- the total N counts every parameter, candidates or not.

``compat="official"`` follows the released PIECE code instead: a parameter is a candidate when its
name does not contain "embed", and N counts the trainable parameters only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Rows = tuple[int, int]  # first, and the one after the last
Pattern = str | re.Pattern[str]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Rows of a matrix that are never treated apart have about so many elements: 16 MiB in float32.
_TOGETHER = 1 << 22


@dataclass(frozen=True)
class Candidates:
    """The parameters a selection may choose from, in the model's order."""

    parameters: dict[str, nn.Parameter]
    total: int  # N, of which the density is a share
    rows: Mapping[str, Rows] = field(default_factory=dict)  # of these parameters, only such rows

    @property
    def count(self) -> int:
        """Elements of all candidates together."""
        return sum(math.prod(self.shape(name)) for name in self.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one candidate, of its rows if they are not all."""
        shape = tuple(self.parameters[name].shape)
        if name in self.rows:
            first, end = self.rows[name]
            return end - first, *shape[1:]
        return shape

    def begin(self, name: str) -> int:
        """The position of a candidate's first element in its parameter."""
        first, _ = self.rows.get(name, (0, 0))
        return first * math.prod(self.parameters[name].shape[1:])

    def own_rows(self, name: str, tensor: Tensor) -> Tensor:
        """The rows that are candidates, of a tensor as large as the parameter."""
        return tensor[slice(*self.rows[name])] if name in self.rows else tensor


def rows_together(tensor: Tensor) -> int:
    """How many rows of a tensor, or of some of its rows, are treated together at least.

    In multiples of 64, so that the columns of a gradient's factor that belong to them are aligned.
    """
    rows = max(1, _TOGETHER // max(1, math.prod(tensor.shape[1:])))
    return rows // 64 * 64 or rows


def _patterns(given: Pattern | Iterable[Pattern] | None, what: str, where: str) -> list[Pattern]:
    if given is None:
        return []
    patterns = [given] if isinstance(given, (str, re.Pattern)) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(
                f"{where}: {what} must hold names, fnmatch patterns or compiled regular "
                f"expressions, got {type(pattern).__name__}"
            )
    return patterns


def _matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return pattern == name or fnmatchcase(name, pattern)


def _matched(names: Iterable[str], patterns: list[Pattern], what: str, where: str) -> set[str]:
    """The names that match any of the patterns; a pattern without a match is an error."""
    known, found = list(names), set()
    for pattern in patterns:
        hits = {name for name in known if _matches(pattern, name)}
        if not hits:
            text = pattern if isinstance(pattern, str) else pattern.pattern
            raise ValueError(
                f"{where}: every pattern of {what} must match a parameter, got {text!r}, which "
                f"matches none of {len(known)} (the first is {known[0] if known else None!r})"
            )
        found |= hits
    return found


def _embedding_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    owned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for parameter in module.parameters(recurse=False)
    }
    parameters = dict(model.named_parameters())
    return {name for name in names if id(parameters[name]) in owned}


def find_candidates(
    model: nn.Module,
    *,
    include: Any = None,
    exclude: Any = None,
    embeddings: bool = False,
    official: bool = False,
    where: str,
) -> Candidates:
    """Apply the rules above; raises when a pattern matches nothing or nothing is left."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    parameters = dict(model.named_parameters())
    if any(hasattr(parameter, "piece_target") for parameter in parameters.values()):
        raise ValueError(
            f"{where}: model must be an ordinary model, got a PieceModel; call its unload() first"
        )
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if official:
        left_out = {name for name in parameters if "embed" in name}
        total = sum(parameters[name].numel() for name in trainable)
    else:
        left_out = set() if embeddings else _embedding_names(model, parameters)
        total = sum(parameter.numel() for parameter in parameters.values())
    chosen = set(parameters)
    wanted = _patterns(include, "include", where)
    for pattern in wanted:
        hits = _matched(parameters, [pattern], "include", where)
        if hits <= left_out:
            raise ValueError(
                f"{where}: include must match candidates, got a pattern that matches only input "
                f"embeddings ({', '.join(sorted(hits))}), which are left out; pass embeddings=True"
            )
    if wanted:
        chosen = _matched(parameters, wanted, "include", where)
    chosen -= _matched(parameters, _patterns(exclude, "exclude", where), "exclude", where)
    names = [
        name
        for name, parameter in parameters.items()
        if name in chosen and name in trainable and name not in left_out and parameter.numel()
    ]
    if not names:
        raise ValueError(
            f"{where}: the model must have candidates, got none among {len(parameters)} "
            f"parameters: {len(trainable)} are trainable (a PieceModel freezes all until "
            f"unload()), {len(left_out)} are embeddings, {len(chosen)} pass include and exclude"
        )
    for name in names:
        if parameters[name].dtype not in DTYPES:
            raise TypeError(
                f"{where}: candidates must be float32, bfloat16 or float16, got "
                f"{parameters[name].dtype} for {name!r}; leave it out with exclude="
            )
    return Candidates({name: parameters[name] for name in names}, total)
