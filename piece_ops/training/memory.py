"""How much memory the process had at most: since it began, and in one phase of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_cuda: Any = torch.cuda

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

_before_reset = 0
"""The peak that the kernel has forgotten; like the kernel's, one for the process."""


def peak_rss_bytes() -> int:
    """Return the most resident memory this process ever had, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB
    return max(_before_reset, peak if sys.platform == "darwin" else peak * 1024)


@contextmanager
def peak_memory(peaks: dict[str, int], phase: str) -> Iterator[None]:
    """Raise ``peaks[phase]`` to the most resident memory in the block, in bytes.

    Where CUDA is in use ``peaks["<phase> (GPU)"]`` is raised to the most that torch had allocated
    on the current device. Only Linux lets a process reset its resident peak; elsewhere none is
    kept. The whole process counts, also what earlier phases have left in memory.
    """
    with _gpu_peak(peaks, f"{phase} (GPU)"), _resident_peak(peaks, phase):
        yield


@contextmanager
def _gpu_peak(peaks: dict[str, int], name: str) -> Iterator[None]:
    if _cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        if _cuda.is_initialized():  # also when the block was the first to use it
            peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated())


@contextmanager
def _resident_peak(peaks: dict[str, int], phase: str) -> Iterator[None]:
    global _before_reset
    _before_reset = peak_rss_bytes()
    try:
        _CLEAR.write_text("5")
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lines = _STATUS.read_text().splitlines()
        peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
        peaks[phase] = max(peaks.get(phase, 0), peak * 1024)
