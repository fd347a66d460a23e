"""What a row says about where and with what it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from piece_ops import _native
from piece_ops.predict import device

# Freed memory stays in the process, in huge pages: without this torch.topk and numpy spend most of
# their time in page faults. Every peer gets the same.
GLIBC_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4000000000:"
    "glibc.malloc.trim_threshold=16000000000"
)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_hash() -> str:
    """The commit, with a + when the tree differs from it; empty outside a repository."""
    root = Path(__file__).resolve().parents[1]
    try:
        named = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True
        )
        if named.returncode:
            return ""
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return named.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _version(package: str) -> str | None:
    """None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """The fields common to all rows of one run."""
    held = _native.describe()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "threads": torch.get_num_threads(),
        "isa": held["isa"],
        "gflop_per_s": round(device("cpu", torch.float32).products / 1e9, 1),
        "piece_ops": held["version"],
        "git": _git_hash(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: _version(name) for name in ("transformers", "peft", "jax")},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
