"""Runs the Python blocks of a Markdown text.

A block under the line ``<!-- needs: NAME -->`` runs only where that module is installed and torch
sees a GPU.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch

BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)


def run_blocks(text: str) -> dict[str, Any]:
    """Run the blocks one after another, with the names of those before; the names at the end."""
    names: dict[str, Any] = {}
    blocks = BLOCK.findall(text)
    assert blocks
    for needed, block in blocks:
        if not needed or (importlib.util.find_spec(needed) and torch.cuda.is_available()):
            exec(block, names)
    return names
