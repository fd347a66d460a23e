"""The Triton kernel of accumulate_per_sample_squares_: interpreted, compiled, absent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from piece_ops.backends import triton as triton_backend

pytest.importorskip("triton", reason="no triton here: nothing to interpret or compile")

from piece_ops.backends.triton import accumulate_per_sample_squares as module

from helpers.aot import SHARED_BYTES, Resources, compile_for

ROOT = Path(__file__).resolve().parents[1]
OP = "accumulate_per_sample_squares_"
# Not the kernel's: bits for bits with the CPU's tile order, the CPU's modes and its instructions.
LEFT_OUT = ("instruction_sets", "same_bits", "flush_denormal", "column_blocks")
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def test_the_contract_holds_in_the_interpreter() -> None:
    """Every other test of the op, its tensors through the interpreted kernel."""
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "helpers.interpreted",
                "-p",
                "no:cacheprovider",
            ),
            *("-p", "no:xdist", "python_tests/test_accumulate_per_sample_squares.py"),
            *("-k", " and ".join(f"not {name}" for name in LEFT_OUT)),
        ],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests")]),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    calls = re.search(r"interpreted calls: (\d+)", done.stdout)
    assert calls and int(calls[1]) > 400, done.stdout[-3000:]


def test_maxima_in_the_interpreter() -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "helpers.interpreted_maxima"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "maxima are right" in done.stdout


def compiled(
    architecture: int,
    tiling: module.Tiling,
    dtype: str,
    precision: str,
    both: bool,
    maxima: str,
    tmp_path: Path,
) -> Resources:
    types = {"square_sums": "*fp32", "sums": "*fp32", "scales": "*fp32", "steps": "*i64"}
    types["maxima"] = "*fp32"
    types |= {"grad_output": f"*{dtype}", "input": f"*{dtype}"}
    types |= dict.fromkeys(("out_features", "in_features", "grad_stride", "input_stride"), "i32")
    constants: dict[str, Any] = {
        "HAS_SQUARE_SUMS": True,
        "HAS_SUMS": both,
        "HAS_SCALES": True,
        "MAXIMA": maxima,
        "UPCAST": False,
        "PRECISION": precision,
        "BLOCK_TOKENS": 32 if dtype == "fp32" else 64,
        **tiling.meta(),
    }
    kernel = module.accumulate_per_sample_squares_kernel
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return compile_for(
        architecture,
        kernel,
        {**types, "n_steps": "i32", "constant": "fp32"},
        constants,
        tmp_path,
        types,
        **options,
    )


def check(
    architecture: int,
    dtype: str,
    precision: str,
    tmp_path: Path,
    *,
    first: bool,
    maxima: bool = True,
) -> None:
    """Of one tiling or all; with the epilogue that leaves maxima, which needs more registers."""
    for both, tilings in ((False, module.TILINGS), (True, module.TILINGS_WITH_BOTH)):
        for tiling in tilings[:1] if first else tilings:
            kind = ("piece-s" if both else "plain") if maxima else ""
            got = compiled(architecture, tiling, dtype, precision, both, kind, tmp_path)
            what = f"sm_{architecture} {dtype} {precision} {tiling} {both}: {got[:3]}"
            assert got.spilled == 0, what
            assert got.shared <= SHARED_BYTES[architecture], what
            # All threads of a block together: a quarter of them more than fits is no launch.
            assert got.registers * tiling.warps * 32 <= 65536, what
            assert (MMA[architecture] in got.ptx) == (precision != "ieee"), what
            assert "cp.async" in got.ptx, what


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_tiling_compiles_for_hopper_without_spilling(dtype: str, tmp_path: Path) -> None:
    check(90, dtype, "tf32", tmp_path, first=False)


@pytest.mark.parametrize("architecture", [80, 100, 120])
def test_compiles_for_every_architecture_without_spilling(
    architecture: int, tmp_path: Path
) -> None:
    check(architecture, "bf16", "tf32", tmp_path, first=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee")],
)
def test_everything_compiles_for_everything(
    architecture: int, dtype: str, precision: str, tmp_path: Path
) -> None:
    for maxima in (False, True):
        check(architecture, dtype, precision, tmp_path, first=False, maxima=maxima)


def test_without_triton_the_call_says_what_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    wanted = rf"piece_ops\.{OP}: CUDA tensors need triton, got none.*'piece_ops\[triton\]'"
    with pytest.raises(RuntimeError, match=wanted):
        triton_backend.kernels(OP)


def test_importing_the_package_loads_no_kernel() -> None:
    code = f"import sys, piece_ops; assert '{module.__name__}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
