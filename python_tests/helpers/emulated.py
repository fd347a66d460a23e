"""The CUDA ops over kernels that run on the CPU: build them, load them, put them in place.

``piece_ops.backends.cuda`` runs as it is, on CPU tensors: only what it asks of torch.cuda and the
extension are replaced. As a pytest plugin (``-p helpers.emulated``) this module routes CPU tensors
to it, so that every contract test of an op checks the emulated kernels instead.

PIECE_OPS_EMULATION names the extension to load, PIECE_OPS_SIMT_SEED the order of blocks and
threads, PIECE_OPS_SIMT_BLOCKS how many of them fill the chip.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from piece_ops import _schema
from piece_ops.backends import _cuda_runtime, cuda, cuda_full_rows

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}


def build(kind: str) -> Path:
    """Compile csrc/cuda with the C++ compiler (only what changed since the last time)."""
    folder = configure_and_build(
        f"emulation-{kind}",
        "-DPIECE_OPS_EMULATION=ON",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DPIECE_OPS_SANITIZE={SANITIZERS[kind]}",
    )
    return next(folder.glob("_emulation*.so"))


def configure_and_build(
    name: str, *settings: str, target: str = "all", compiler: str | None = None
) -> Path:
    """Run CMake in build/<name> and build a target; the folder. PIECE_OPS_JOBS limits the jobs."""
    import pybind11

    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("PIECE_OPS_JOBS", str(os.cpu_count() or 1))
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *settings]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    if compiler:
        configure += [f"-DCMAKE_CUDA_COMPILER={compiler}"]
    make = ["cmake", "--build", str(folder), "--target", target, "--parallel", jobs]
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist: one worker builds
        for command in (configure, make):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return folder


def load(path: Path) -> ModuleType:
    """Import the extension; seed and size of the chip come from the environment."""
    spec = importlib.util.spec_from_file_location("_emulation", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_seed(int(os.environ.get("PIECE_OPS_SIMT_SEED", "0")))
    if blocks := os.environ.get("PIECE_OPS_SIMT_BLOCKS"):
        module.set_device(int(blocks), 1)
    return module


class EmulatedRuntime(_cuda_runtime.Runtime):
    """One device, one stream, all memory the CPU's."""

    def __init__(self, extension: ModuleType) -> None:
        super().__init__()
        self.extension = extension
        self.captures = False

    def module(self, op: str) -> ModuleType:
        return self.extension

    def takes(self, tensor: torch.Tensor) -> bool:
        return True

    def index(self, device: torch.device) -> int:
        return 0

    def on(self, index: int) -> Any:
        return contextlib.nullcontext()

    def stream(self, index: int) -> int:
        return 0

    def is_capturing(self) -> bool:
        return self.captures


def cuda_implementations() -> dict[str, Any]:
    """Op name -> the function that backends registers for CUDA tensors."""
    found = {op: getattr(cuda, op) for op in _schema.OPS if hasattr(cuda, op)}
    select_topk = sys.modules.get("piece_ops.backends.cuda_select_topk")
    if select_topk is not None:
        found["select_topk"] = select_topk.select_topk
    return found


@contextlib.contextmanager
def emulation(extension: ModuleType) -> Iterator[EmulatedRuntime]:
    """Inside: the functions of backends.cuda work on CPU tensors, through the emulated kernels."""
    runtime = EmulatedRuntime(extension)
    before = _cuda_runtime.use(runtime)
    try:
        yield runtime
    finally:
        _cuda_runtime.forget_tables()
        cuda._skipped_replays.clear()
        cuda._has_captured.clear()
        _cuda_runtime.use(before)


def route_cpu_tensors() -> torch.library.Library:
    """From now on, in this process, torch.ops.piece_ops on CPU tensors run the emulated kernels."""
    library = torch.library.Library("piece_ops", "IMPL")
    for op, function in cuda_implementations().items():
        library.impl(op, function, "CPU", allow_override=True)
    return library


_kept: list[Any] = []


def compute_no_row_whole() -> None:
    """For the tests of contracts, which compare bits: sampled gradients one by one."""
    cuda_full_rows.LEAST = 1 << 62


def pytest_configure(config: Any) -> None:
    """The plugin: put the emulation in place before any test is collected."""
    if "PIECE_OPS_EMULATION" not in os.environ:
        return
    extension = load(Path(os.environ["PIECE_OPS_EMULATION"]))
    context = emulation(extension)
    context.__enter__()
    compute_no_row_whole()
    _kept.extend([extension, context, route_cpu_tensors()])


def pytest_unconfigure(config: Any) -> None:
    """Say, for the caller of this process, how much really ran on emulated kernels."""
    if not _kept:
        return
    extension, context, _ = _kept
    print(f"\nemulated launches: {extension.launch_count()}; skipped: {extension.skipped_count()}")
    context.__exit__(None, None, None)
