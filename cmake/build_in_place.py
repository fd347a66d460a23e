"""Build the extension with CUDA into the source tree, for the GPU that is here; no pip, no network.

Needs Python with torch (whose pybind11 headers serve if there are no others), nvcc, CMake and
ninja. ``python cmake/build_in_place.py [CMake settings]``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def architectures() -> str:
    """Those of the GPUs in this machine; every one that is shipped, if there is none."""
    import torch

    if not torch.cuda.is_available():
        return "80-real;90-real;100-real;120"
    found = {
        torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())
    }
    return ";".join(f"{major}{minor}-real" for major, minor in sorted(found))


def main() -> int:
    build = ROOT / "build" / "in-place"
    version = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version = ")
    )
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DPIECE_OPS_CUDA=ON"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures()}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DPIECE_OPS_VERSION={version}"]
    # Compilers that nobody has tried this with may warn of more; here the kernels are to run.
    configure += ["-DPIECE_OPS_WERROR=OFF"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    try:
        import pybind11
    except ImportError:
        pass
    else:
        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    jobs = os.environ.get("PIECE_OPS_JOBS", str(os.cpu_count() or 1))
    subprocess.run([*configure, *sys.argv[1:]], check=True)
    subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
    install = ["cmake", "--install", str(build), "--component", "module"]
    subprocess.run([*install, "--prefix", str(ROOT / "piece_ops")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
