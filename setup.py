"""Bridge from setuptools to CMake: builds the one extension module, piece_ops._C.

Everything else about the package stands in pyproject.toml. Settings from the environment:
PIECE_OPS_CUDA=AUTO|ON|OFF (default AUTO), CMAKE_ARGS (passed on), CMAKE_BUILD_TYPE (Release).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configure, build and install with CMake; no compiler flag is decided here."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # The folder the finished module belongs in: the wheel's staging area, or the source tree
        # for an editable install.
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
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


setup(ext_modules=[Extension("piece_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
