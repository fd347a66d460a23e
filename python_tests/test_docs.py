"""Every docstring example runs. (What stands in Markdown: test_doc_blocks.py.)"""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import piece_ops

MODULES = [
    module.name
    for module in pkgutil.walk_packages(piece_ops.__path__, "piece_ops.")
    if not module.name.endswith(("._C", ".__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("piece_ops.backends.triton."):
        pytest.importorskip("triton")
    failed, _tried = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    with_examples = [
        name
        for name in MODULES
        if any(test.examples for test in finder.find(importlib.import_module(name)))
    ]
    assert {"piece_ops.functional", "piece_ops.model"} <= set(with_examples)
