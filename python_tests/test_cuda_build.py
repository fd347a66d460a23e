"""The CUDA build, without a GPU: every kernel on every architecture, no spill, import, no GPU."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from bench import cuda_cub
from piece_ops.backends import _cuda_runtime

from helpers.emulated import configure_and_build

ROOT = Path(__file__).resolve().parents[1]
MOST_REGISTERS = 128  # keep 16 warps of an SM resident
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")


def resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> registers, shared bytes and spilled bytes, from ptxas -v."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    here: dict[str, int] = {}
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            here = found.setdefault((entry[1], entry[2]), {})
        if spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            here["spilled"] = int(spill[1]) + int(spill[2])
        if used := re.search(r"Used (\d+) registers", line):
            here["registers"] = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            here["shared"] = int(shared[1]) if shared else 0
    return found


def test_the_report_of_ptxas_is_understood() -> None:
    text = """ptxas info    : Compiling entry function 'f_kernel' for 'sm_90'
        8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
    ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem"""
    want = {"registers": 40, "shared": 2048, "spilled": 12}
    assert resources(text) == {("f_kernel", "sm_90"): want}


@pytest.fixture(scope="module")
def build() -> Path:
    """The folder of the extension with CUDA for every architecture, compiled once and linked."""
    if not NVCC:
        pytest.skip("no nvcc here: nothing to compile with")
    settings = ("-DPIECE_OPS_CUDA=ON", "-DPIECE_OPS_RESOURCES=ON")
    return configure_and_build("cuda", *settings, target="_C", compiler=NVCC)


def test_every_kernel_compiles_for_every_architecture_without_spilling(build: Path) -> None:
    """Warnings, spills and too many registers are errors."""
    reports = sorted((build / "resources").glob("*.txt"))
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert [r.stem for r in reports] == [s.stem for s in sources]
    found = resources("\n".join(r.read_text() for r in reports))
    kernels = {kernel for kernel, _ in found}
    assert {arch for _, arch in found} == set(ARCHITECTURES)
    assert len(found) == len(kernels) * len(ARCHITECTURES)
    assert all("_kernel" in kernel for kernel in kernels)
    for (kernel, arch), used in found.items():
        assert used["spilled"] == 0, f"{kernel} {arch}: {used}"
        assert used["shared"] <= 48 * 1024, f"{kernel} {arch}: {used}"
        assert used["registers"] <= MOST_REGISTERS, f"{kernel} {arch}: {used}"


def run_without_gpu(build: Path, folder: Path, *arguments: str) -> str:
    """What Python prints with the package over this extension, where no GPU is to be seen."""
    package = folder / "piece_ops"
    package.mkdir()
    for path in (ROOT / "piece_ops").iterdir():
        if not path.name.startswith(("_C.", "__pycache__")):
            (package / path.name).symlink_to(path)
    (library,) = build.glob("_C.*.so")
    (package / library.name).symlink_to(library)
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The backend as it is; only torch, which may know of no CUDA, is not asked where tensors lie.
CALL = """
from contextlib import nullcontext
import torch
import piece_ops
from piece_ops.backends import _cuda_runtime, cuda

class Runtime(_cuda_runtime.Runtime):
    takes = lambda self, tensor: True
    index = lambda self, device: 0
    on = lambda self, index: nullcontext()
    stream = lambda self, index: 0

print(piece_ops.select_topk(torch.tensor([3.0, 1.0, 2.0]), 2).indices.tolist())
_cuda_runtime.use(Runtime())
try:
    cuda.total([torch.ones(3)])
except RuntimeError as error:
    print(error)
"""


def test_the_first_cuda_call_says_what_is_missing(build: Path, tmp_path: Path) -> None:
    """Without driver or GPU the package imports, CPU ops work, and a CUDA op names the lack."""
    selected, error = run_without_gpu(build, tmp_path, "-c", CALL).splitlines()
    assert selected == "[0, 2]"
    assert "needs an NVIDIA GPU and its driver, got cudaError" in error
    assert re.search(r"\((35|100)\)", error), error


def test_info_names_what_is_built_in(build: Path, tmp_path: Path) -> None:
    rows = run_without_gpu(build, tmp_path, "-m", "piece_ops", "info").splitlines()
    found = {row[:15].strip(): row[15:].strip() for row in rows}
    assert found["CUDA kernels"] == ", ".join((*ARCHITECTURES, "compute_120")), rows
    assert found["extension"].startswith(str(tmp_path)), rows
    assert found["GPU"] == "none", rows


def test_the_module_needs_no_cuda_library(build: Path) -> None:
    """The runtime is linked in: what is looked for at import is there on every machine."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("no readelf")
    (library,) = build.glob("_C.*.so")
    done = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", done.stdout)
    assert needed and not [name for name in needed if "cuda" in name or "nv" in name], needed


def test_a_peer_of_the_benchmark_compiles(tmp_path: Path) -> None:
    """cub::DeviceTopK where the toolkit has it, and the words for it being absent where not."""
    if not NVCC:
        pytest.skip("no nvcc here: nothing to compile with")
    command = cuda_cub.command(NVCC, tmp_path / "cub.so", "sm_90")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    library = cuda_cub.load(tmp_path / "cub.so")
    if not torch.cuda.is_available():
        assert library.cub_topk_bytes(1000, 10) < 0


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class CpuOnly:
        cuda_architectures = ()

    monkeypatch.setattr(_cuda_runtime, "extension", CpuOnly)
    with pytest.raises(NotImplementedError, match=r"piece_ops\.gather: .*PIECE_OPS_CUDA=ON"):
        _cuda_runtime.Runtime().module("gather")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda_require_device is asked once for each device, and its error is passed on."""
    asked = []

    class Module:
        def cuda_require_device(self, index: int) -> None:
            asked.append(index)
            if index:
                raise RuntimeError("piece_ops: this build has CUDA code for sm_80, but ...")

    runtime, module = _cuda_runtime.Runtime(), Module()
    for _ in range(2):
        runtime.require(module, 0)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="this build has CUDA code for"):
            runtime.require(module, 1)  # type: ignore[arg-type]
    assert asked == [0, 1, 1]


def build_requirements(**settings: str) -> list[str]:
    """What pip is asked to bring for the build, on a PATH without nvcc."""
    pytest.importorskip("setuptools")
    code = "from setuptools import build_meta as b; print(b.get_requires_for_build_wheel())"
    environment = {k: v for k, v in os.environ.items() if k != "CUDACXX"}
    environment |= {"PATH": "/nowhere", **settings}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    return sorted(name for name in found if name.startswith("nvidia"))


def test_pip_is_asked_for_nvcc_only_where_there_is_none() -> None:
    assert build_requirements(PIECE_OPS_CUDA="AUTO") == []
    assert build_requirements(PIECE_OPS_CUDA="OFF") == []
    assert build_requirements(PIECE_OPS_CUDA="ON", CUDACXX="/opt/cuda/bin/nvcc") == []
    asked = build_requirements(PIECE_OPS_CUDA="ON")
    here = ("/usr/local/cuda", sysconfig.get_path("purelib") + "/nvidia/cu13")
    if any(Path(folder, "bin/nvcc").exists() for folder in here):
        assert asked == []
        return
    assert len(asked) == 5 and all(re.fullmatch(r"nvidia-[a-z-]+==13\.0\.\d+", x) for x in asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_describe_without_a_gpu() -> None:
    from piece_ops import _native

    assert _native.describe()["gpu"] is None
