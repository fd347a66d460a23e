"""As a pytest plugin (``-p helpers.interpreted``): the Triton ops on CPU tensors, interpreted.

For a process with TRITON_INTERPRET=1, which Triton reads when a kernel is defined. Every contract
test of such an op then checks the kernel, in tiles small enough that small cases have several.
"""

from __future__ import annotations

from typing import Any

import torch

from piece_ops.backends.triton import accumulate_per_sample_squares as kernel

TILING = kernel.Tiling(16, 32, 4, 3)
_kept: list[Any] = []
calls = described = 0
_sample_length = kernel.sample_length


def _counted_length(*arguments: Any) -> int:
    global described
    length = _sample_length(*arguments)
    described += length > 0
    return length


def accumulate_per_sample_squares_(*arguments: Any) -> None:
    global calls
    calls += 1
    kernel.accumulate_per_sample_squares_(*arguments, tiling=TILING)


def pytest_configure(config: Any) -> None:
    kernel.sample_length = _counted_length
    library = torch.library.Library("piece_ops", "IMPL")
    op = "accumulate_per_sample_squares_"
    library.impl(op, accumulate_per_sample_squares_, "CPU", allow_override=True)
    _kept.append(library)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"interpreted calls: {calls}, with descriptors: {described}")
