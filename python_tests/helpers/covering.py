"""A pytest plugin (``-p helpers.covering``): the contract tests in few cases, for the sanitizers.

Every test function stays. Of its parametrised cases as few stay as show every value of every
parameter once. PIECE_OPS_ONE_IN divides what a case holds (helpers/cases.py).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


def cover(cases: list[dict[str, Any]]) -> list[int]:
    """Which of these cases to keep, given the parameters of each, so that no value is lost.

    The next one is that with most values that have not occurred; among equals the one whose values
    have occurred least, so that parameters do not vary in step.
    """
    pairs = [[(name, repr(value)) for name, value in case.items()] for case in cases]
    seen: Counter[tuple[str, str]] = Counter()
    kept: list[int] = []
    while True:
        best = max(
            range(len(cases)),
            key=lambda i: (sum(not seen[p] for p in pairs[i]), -sum(seen[p] for p in pairs[i])),
        )
        if all(seen[p] for p in pairs[best]):
            return sorted(kept)
        seen.update(pairs[best])
        kept.append(best)


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    functions: dict[Any, list[Any]] = {}
    for item in items:
        functions.setdefault(item.function, []).append(item)
    kept: list[Any] = []
    for cases in functions.values():
        if hasattr(cases[0], "callspec"):
            kept += [cases[i] for i in cover([case.callspec.params for case in cases])]
        else:
            kept += cases
    left_out = [item for item in items if item not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
