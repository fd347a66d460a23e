"""The documentation runs: every docstring example, and the Python blocks of the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import piece_ops

from helpers.tiny_lm import save_tiny

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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


def test_readme_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as written, but for the folder of the model: a tiny one stands in."""
    pytest.importorskip("accelerate")  # transformers' Trainer needs it
    save_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)  # they write files
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(re.sub(r'folder = ".*?"', f"folder = {str(tmp_path)!r}", block), names)
    assert isinstance(names["top"], piece_ops.TopK)
    assert piece_ops.Delta.from_pretrained("run").task == "capitals"
