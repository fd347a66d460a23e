"""Bridge from setuptools to CMake: builds the one extension module, piece_ops._C.

Everything else about the package stands in pyproject.toml. Settings from the environment:
PIECE_OPS_CUDA=AUTO|ON|OFF (default AUTO), CMAKE_ARGS (passed on), CMAKE_BUILD_TYPE (Release).
AUTO takes the nvcc that is there; ON also asks pip for one, into the isolated build, if none is.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Where CMakeLists.txt looks for nvcc; the last is the nvidia-cuda-nvcc wheel of this Python.
NVCC_FOLDERS = (
    os.environ.get("PATH", ""),
    "/usr/local/cuda/bin",
    os.path.join(sysconfig.get_path("purelib"), "nvidia/cu13/bin"),
)


class CMakeBuild(build_ext):
    """Configure, build and install with CMake; no compiler flag is decided here."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # The folder the finished module belongs in: the wheel's staging area, or the source tree
        # for an editable install.
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        fetched = nvcc_wheels()
        if fetched:
            build /= "fetched-nvcc"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DPIECE_OPS_VERSION={self.distribution.get_version()}",
            f"-DPIECE_OPS_CUDA={os.environ.get('PIECE_OPS_CUDA', 'AUTO')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # Given anew each time: with build isolation both live in a folder that is gone later.
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if fetched:  # nvcc lives in a folder that pip removes: an earlier configuration is void
            configure.append("--fresh")
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        subprocess.run(
            ["cmake", "--install", str(build), "--prefix", str(target), "--component", "module"],
            check=True,
        )


def nvcc_wheels() -> list[str]:
    """What pip has to bring for this build, besides what pyproject.toml says."""
    has_nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(NVCC_FOLDERS))
    if os.environ.get("PIECE_OPS_CUDA") != "ON" or has_nvcc:
        return []
    lines = (ROOT / "cmake" / "nvcc-wheels.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


setup(
    ext_modules=[Extension("piece_ops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # pip asks for these through the build backend (PEP 517), which reads them here.
    setup_requires=nvcc_wheels(),
)
