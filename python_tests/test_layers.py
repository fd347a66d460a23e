"""The floors of the house: arrows point down only, torch and pybind11 stay where they belong.

Parses every import and every #include; nothing is run. Python: a module may import modules of a
lower floor only. The two floors whose modules know each other (importance, selection, model, optim,
delta; and everything inside training) form one floor each. C++ in csrc/: see `CPP_MAY_INCLUDE`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# ---- Python -----------------------------------------------------------------------------------

# Module (or package) of piece_ops -> floor.
PYTHON_FLOORS = {
    "_native": 0,
    "_dlpack": 0,
    "_schema": 1,
    "_foreign": 1,
    "_arrays": 2,
    "_topk": 2,
    "_files": 0,
    "backends": 2,
    "functional": 3,
    "importance": 4,
    "selection": 4,
    "model": 4,
    "optim": 4,
    "delta": 4,
    "training": 5,
    "predict": 5,
    "cli_delta": 5,
    "cli_bench": 5,
    "cli": 6,
    "__main__": 7,
}
# Other modules with a leading underscore are private parts of this floor.
PRIVATE_FLOOR = 4
# Floors on which modules may import one another; between other modules of one floor: sideways.
SHARED_FLOORS = {4, 5}
TRAINING = 5
EXTRA_PACKAGES = {"transformers", "tqdm", "matplotlib", "jinja2"}  # the [train] extra
# Libraries whose arrays are taken by type or protocol, without importing them.
NEVER_IMPORTED = {"jax", "jaxlib", "ml_dtypes", "cupy", "tensorflow"}


def imported(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """Absolute dotted names imported anywhere in a module (also inside functions), with lines."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno


def module_name(path: Path) -> str:
    """``piece_ops/a/b.py`` -> ``piece_ops.a.b``; a package's ``__init__`` keeps that last part."""
    return ".".join(path.with_suffix("").parts)


def floor_of(dotted: str) -> tuple[str, int] | None:
    """The first part below piece_ops and its floor; None when that part is not on a floor."""
    parts = dotted.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    if name in PYTHON_FLOORS:
        return name, PYTHON_FLOORS[name]
    is_private = name.startswith("_") and name not in ("_C", "__init__")
    return (name, PRIVATE_FLOOR) if is_private else None


def python_violations(files: dict[Path, str]) -> list[str]:
    """What breaks the rules in these files (paths relative to the repository root)."""
    found = []
    for path, text in sorted(files.items()):
        module = module_name(path)
        here = floor_of(module)
        top = module.split(".")[1]
        if here is None and top not in {"__init__", "reference", "_C"}:
            found.append(f"{path}: on no floor; add it to PYTHON_FLOORS")
            continue
        for name, line in imported(ast.parse(text), module):
            where = f"{path}:{line}: imports {name}"
            package = name.split(".")[0]
            if package == "triton" and not module.startswith("piece_ops.backends.triton."):
                found.append(f"{where}: only backends/triton may")
            if package in EXTRA_PACKAGES and (here is None or here[1] < TRAINING):
                found.append(f"{where}: only training and above may")
            if package in NEVER_IMPORTED:
                found.append(f"{where}: its arrays are known without it")
            if package != "piece_ops":
                continue
            target = name.split(".")[1] if "." in name else ""
            if target == "reference":
                found.append(f"{where}: reference is for tests and benchmarks")
            elif top == "reference":
                found.append(f"{where}: reference must stand alone")
            elif target == "_C":
                if top != "_native":
                    found.append(f"{where}: only _native loads the extension")
            elif here is not None and (there := floor_of(name)) is not None:
                found += _arrow(where, here, there)
    return found


def _arrow(where: str, here: tuple[str, int], there: tuple[str, int]) -> list[str]:
    if there[1] > here[1]:
        return [f"{where}: upward, from floor {here[1]} to {there[1]}"]
    if there[1] == here[1] and there[0] != here[0] and here[1] not in SHARED_FLOORS:
        return [f"{where}: sideways on floor {here[1]}"]
    return []


def read(*patterns: str) -> dict[Path, str]:
    paths = [p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()]
    return {p.relative_to(ROOT): p.read_text(encoding="utf-8") for p in paths}


def test_python_arrows_point_down() -> None:
    files = read("piece_ops/**/*.py")
    assert len(files) > 5
    assert python_violations(files) == []


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("piece_ops/backends/cpu.py", "from piece_ops.functional import gather", "upward"),
        ("piece_ops/backends/cpu.py", "from ..functional import gather", "upward"),
        ("piece_ops/_schema/total.py", "def f():\n    import piece_ops.cli", "upward"),
        ("piece_ops/functional.py", "from . import importance", "upward"),
        ("piece_ops/functional.py", "from piece_ops._inject import inject", "upward"),
        ("piece_ops/_inject.py", "from piece_ops.training import run", "upward"),
        ("piece_ops/model.py", "from .training import data", "upward"),
        ("piece_ops/functional.py", "from . import reference", "reference"),
        ("piece_ops/backends/cuda.py", "import triton.language", "backends/triton"),
        ("piece_ops/optim.py", "import transformers", "training"),
        ("piece_ops/__init__.py", "import tqdm", "training"),
        ("piece_ops/_foreign.py", "def f():\n    import jax.numpy", "without it"),
        ("piece_ops/functional.py", "from piece_ops import _C", "extension"),
        ("piece_ops/reference.py", "from .functional import gather", "alone"),
        ("piece_ops/utils2.py", "", "no floor"),
    ],
)
def test_a_planted_python_violation_is_caught(path: str, text: str, words: str) -> None:
    found = python_violations({Path(path): text})
    assert len(found) == 1 and words in found[0], found


def test_what_is_allowed_in_python_passes() -> None:
    allowed = {
        Path(
            "piece_ops/functional.py"
        ): "import torch\nfrom . import _schema\nfrom .backends import cpu",
        Path("piece_ops/backends/cpu.py"): "from .. import _native, _schema",
        Path("piece_ops/backends/triton/a.py"): "import triton\nfrom piece_ops import _schema",
        Path("piece_ops/training/loop.py"): "import transformers\nfrom ..model import PieceModel",
        Path("piece_ops/training/a.py"): "from . import b\nfrom .b import c",
        Path(
            "piece_ops/__init__.py"
        ): "from .functional import gather\nfrom .optim import SparseAdamW",
        Path("piece_ops/_native.py"): "from . import _C",
    }
    assert python_violations(allowed) == []


# ---- C++ --------------------------------------------------------------------------------------

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# Floor -> floors it may include. cpu and cuda do not see each other; test may see all but binding.
CPP_MAY_INCLUDE = {
    "math": {"math"},
    "core": {"math", "core"},
    "ops": {"math", "core", "ops"},
    "cpu": {"math", "core", "ops", "cpu"},
    "cuda": {"math", "core", "ops", "cuda"},
    "binding": {"math", "core", "ops", "cpu", "cuda", "binding"},
    "test": {"math", "core", "ops", "cpu", "cuda", "test"},
}
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)(/|$)|^THC")
PYTHON = re.compile(r"^(pybind11/|Python\.h$)")
INTRINSICS = re.compile(r"^(\w*intrin|\w*mmintrin|x86gprintrin|cpuid|arm_neon|arm_sve)\.h$")
CUDA_HEADER = re.compile(r"^(cuda|cub/|thrust/|cuda_runtime|cooperative_groups)")


def cpp_floor(path: Path) -> str | None:
    """The floor of a file in csrc, or None when it lies outside every floor."""
    parts = path.parts
    if parts[:3] == ("csrc", "include", "piece_ops") and len(parts) > 4:
        return parts[3] if parts[3] in ("math", "core", "ops") else None
    return parts[1] if len(parts) > 2 and parts[1] in ("cpu", "cuda", "binding", "test") else None


def resolve(path: Path, name: str, files: dict[Path, str]) -> str | None:
    """The floor of an included file of ours; None for system headers."""
    if name.startswith("piece_ops/"):
        return cpp_floor(Path("csrc/include") / name)
    for base in (path.parent, Path("csrc"), *path.parents):
        parts: list[str] = []
        for part in (base / name).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        if Path(*parts) in files:
            return cpp_floor(Path(*parts))
    return None


def cpp_violations(files: dict[Path, str]) -> list[str]:
    """What breaks the rules in these files of csrc."""
    found = []
    for path, text in sorted(files.items()):
        floor = cpp_floor(path)
        if floor is None:
            found.append(f"{path}: on no floor of csrc")
            continue
        for match in INCLUDE.finditer(text):
            name = match.group(1)
            where = f"{path}:{text[: match.start(1)].count(chr(10)) + 1}: includes {name}"
            if TORCH.search(name):
                found.append(f"{where}: no torch in csrc")
            elif PYTHON.search(name) and floor != "binding":
                found.append(f"{where}: pybind11 and Python only in csrc/binding")
            elif INTRINSICS.search(name) and floor != "cpu":
                found.append(f"{where}: instruction sets only in csrc/cpu")
            elif CUDA_HEADER.search(name) and floor not in ("cuda", "test"):
                found.append(f"{where}: CUDA headers only in csrc/cuda")
            else:
                there = resolve(path, name, files)
                if there is not None and there not in CPP_MAY_INCLUDE[floor]:
                    found.append(f"{where}: {floor} may not see {there}")
    return found


def test_cpp_arrows_point_down() -> None:
    suffixes = (".h", ".hpp", ".cpp", ".cu", ".cuh", ".inc", ".inl")
    files = {p: t for p, t in read("csrc/**/*").items() if p.suffix in suffixes}
    assert len(files) > 10
    assert cpp_violations(files) == []


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("csrc/cpu/a.cpp", "#include <torch/extension.h>", "no torch"),
        ("csrc/binding/a.cpp", "#include <ATen/ATen.h>", "no torch"),
        ("csrc/cpu/a.cpp", "# include <c10/util/BFloat16.h>", "no torch"),
        ("csrc/cpu/a.cpp", "#include <pybind11/pybind11.h>", "only in csrc/binding"),
        ("csrc/include/piece_ops/math/a.h", "#include <immintrin.h>", "instruction sets"),
        ("csrc/binding/a.cpp", "#include <x86intrin.h>", "instruction sets"),
        ("csrc/cpu/a.cpp", "#include <cuda_runtime.h>", "CUDA headers"),
        (
            "csrc/include/piece_ops/math/a.h",
            '#include "piece_ops/core/check.h"',
            "may not see core",
        ),
        ("csrc/include/piece_ops/core/a.h", '#include "piece_ops/ops/b.h"', "may not see ops"),
        ("csrc/cuda/a.cu", '#include "../cpu/b.h"', "may not see cpu"),
        ("csrc/cuda/a.cu", '#include "cpu/b.h"', "may not see cpu"),
        ("csrc/misc/a.cpp", "", "no floor"),
    ],
)
def test_a_planted_cpp_violation_is_caught(path: str, text: str, words: str) -> None:
    files = {Path(path): text, Path("csrc/cpu/b.h"): ""}
    found = cpp_violations(files)
    assert len(found) == 1 and words in found[0], found


def test_what_is_allowed_in_cpp_passes() -> None:
    allowed = {
        Path("csrc/include/piece_ops/ops/a.h"): '#include <vector>\n#include "piece_ops/core/b.h"',
        Path(
            "csrc/cpu/a.cpp"
        ): '#include <immintrin.h>\n#include "piece_ops/ops/a.h"\n#include "b.h"',
        Path("csrc/cpu/b.h"): '#include "piece_ops/math/c.h"',
        Path("csrc/binding/a.cpp"): '#include <pybind11/pybind11.h>\n#include "piece_ops/ops/a.h"',
    }
    assert cpp_violations(allowed) == []
