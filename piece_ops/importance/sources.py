"""What an importance pass is asked for: reference sources, k, progress bars over batches."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from operator import index
from pathlib import Path
from typing import Any

from piece_ops.importance.batches import is_batch


def sources_of(reference: Any, statistics: type, where: str) -> list[Any]:
    """One reference or a list of them, checked; a list of batches is one.

    `statistics` is the class whose instances are sources of their own.
    """
    if reference is None:
        return []

    def single(value: Any) -> bool:
        return isinstance(value, (str, os.PathLike, statistics))

    if isinstance(reference, (list, tuple)) and reference:
        if any(single(item) for item in reference) or not any(is_batch(b) for b in reference):
            sources = list(reference)
        else:
            sources = [reference]
    else:
        sources = [reference]
    for source in sources:
        if is_batch(source) and not isinstance(source, (list, tuple)):
            raise TypeError(
                f"{where}: reference must hold batches, 'self', an Importance or a path, got one "
                f"{type(source).__name__}; put a single batch in a list"
            )
        if isinstance(source, (str, os.PathLike)) and source != "self":
            if not Path(source).is_file():
                raise FileNotFoundError(
                    f"{where}: reference must be 'self' or the path of saved statistics, got "
                    f"{str(source)!r}, which is no file"
                )
        elif not single(source) and not isinstance(source, Iterable):
            raise TypeError(
                f"{where}: reference must hold batches, 'self', an Importance or a path, got "
                f"{type(source).__name__}"
            )
    return sources


def show_progress(
    items: Iterable[Any], title: str, progress: bool, total: int | None = None
) -> Iterable[Any]:
    """`items`, with a bar on the terminal when `progress` is wanted (which needs tqdm)."""
    if not progress:
        return items
    try:
        tqdm = import_module("tqdm").tqdm  # optional, so not imported with the package
    except ImportError as error:
        raise ImportError(
            "piece_ops.estimate: progress=True needs tqdm; install it with: "
            'pip install "piece_ops[train]"'
        ) from error
    shown: Iterable[Any] = tqdm(items, desc=title, total=total, unit="batch")
    return shown


def wanted_k(density: float | None, k: int | None, total: int, where: str) -> int:
    """The number of coordinates that a density or a k asks for."""
    if (density is None) == (k is None):
        raise ValueError(
            f"{where}: exactly one of density and k must be given, got density={density}, k={k}"
        )
    if k is not None:
        if isinstance(k, bool) or not hasattr(k, "__index__"):
            raise TypeError(f"{where}: k must be an int, got {type(k).__name__}")
        return index(k)
    if not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
        raise ValueError(f"{where}: density must be in (0, 1], got {density!r}")
    return max(1, int(density * total))
