"""cub::DeviceTopK as a peer: compiled when it is asked for, where the toolkit has it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cuda_timing import Peer

SOURCE = Path(__file__).parent / "peers_cub_topk.cu"
NAME = "cub::DeviceTopK"


def cub_topk(x: Tensor, k: int, check: Callable[[Any], str | None]) -> Peer:
    """DeviceTopK, compiled now; it takes any of the ties and is not deterministic."""
    library = _cub()
    values = torch.empty(k, dtype=torch.float32, device=x.device)
    positions = torch.empty(k, dtype=torch.int64, device=x.device)
    n_bytes = library.cub_topk_bytes(x.numel(), k)
    if n_bytes < 0:
        raise RuntimeError("the toolkit's CUB has no DeviceTopK (CCCL 3.2 and later have)")
    scratch = torch.empty(n_bytes, dtype=torch.uint8, device=x.device)

    def run() -> Tensor:
        pointers = [t.data_ptr() for t in (x, values, positions)]
        stream = torch.cuda.current_stream().cuda_stream
        done = library.cub_topk(scratch.data_ptr(), n_bytes, *pointers, x.numel(), k, stream)
        if done < 0:
            raise RuntimeError(f"CUB failed with {-1 - done}")
        return positions

    return Peer(NAME, run, check)


_library: list[Any] = []


def command(nvcc: str, library: Path, architecture: str) -> list[str]:
    """How the peer is compiled."""
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch={architecture}"]
    return [nvcc, *options, "-o", str(library), str(SOURCE)]


def load(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.cub_topk_bytes.argtypes = [number, number]
    library.cub_topk_bytes.restype = number
    library.cub_topk.argtypes = [pointer, number, pointer, pointer, pointer, number, number]
    library.cub_topk.argtypes += [pointer]
    library.cub_topk.restype = number
    return library


def _cub() -> Any:
    if _library:
        return _library[0]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    path = Path(tempfile.mkdtemp(prefix="piece_ops-bench-")) / "cub.so"
    try:
        done = subprocess.run(command(nvcc, path, "native"), capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"no nvcc: {error}") from error
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.splitlines()[0]}")
    _library.append(load(path))
    return _library[0]
