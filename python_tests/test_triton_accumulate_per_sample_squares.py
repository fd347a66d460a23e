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
from piece_ops.backends.triton import finite

from helpers.aot import SHARED_BYTES, Resources, compile_for

ROOT = Path(__file__).resolve().parents[1]
OP = "accumulate_per_sample_squares_"
# Not the kernel's: bits for bits with the CPU's tile order, the CPU's modes and its instructions.
LEFT_OUT = ("instruction_sets", "same_bits", "flush_denormal", "column_blocks")
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
LOAD = "cp.async.bulk.tensor.3d"


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
    # Of both kinds of loads: by descriptors where samples are as long as each other, by pointers.
    described = re.search(r"with descriptors: (\d+)", done.stdout)
    assert described and 40 < int(described[1]) < int(calls[1]) - 40, done.stdout[-3000:]


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
    tma: bool = False,
    flags: int = 0,
) -> Resources:
    types = {"square_sums": "*fp32", "sums": "*fp32", "scales": "*fp32", "steps": "*i64"}
    types |= {"maxima": "*fp32", "flags": "*i32"}
    types |= {"grad_output": f"*{dtype}", "input": f"*{dtype}"}
    types |= dict.fromkeys(("out_features", "in_features", "grad_stride", "input_stride"), "i32")
    divisible = list(types)
    if tma:
        out, width = tiling.block_out, tiling.block_in
        described = {"square_sums": f"tensordesc<fp32[{out}, {width}]>"}
        described["sums"] = described["square_sums"] if both else "*fp32"
        described["grad_output"] = f"tensordesc<{dtype}[1, 64, {out}]>"
        described["input"] = f"tensordesc<{dtype}[1, 64, {width}]>"
        types |= described | {"steps": "*fp32"}
        divisible = [name for name in types if name not in described]
    constants: dict[str, Any] = {
        "HAS_SQUARE_SUMS": True,
        "HAS_SUMS": both,
        "HAS_SCALES": True,
        "FLAGS": flags,
        "TMA": tma,
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
        {**types, "n_steps": "i32", "length": "i32", "constant": "fp32"},
        constants,
        tmp_path,
        divisible,
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


@pytest.mark.parametrize("architecture", [90, 100])
def test_tma_compiles_without_spilling_and_loads_run_ahead(
    architecture: int, tmp_path: Path
) -> None:
    """Also with all three accumulators, and with the looks' flags."""
    for tiling in (module.TMA_TILING, module.TMA_TILING_HALF):
        for both, kind, flags in ((False, "plain", 0), (True, "piece-s", 0), (True, "", 1024)):
            got = compiled(architecture, tiling, "bf16", "tf32", both, kind, tmp_path, True, flags)
            what = f"sm_{architecture} {tiling} {both} {kind}: {got[:3]}"
            assert got.spilled == 0, what
            # Two blocks of half tiles in an SM.
            blocks = 1 if tiling == module.TMA_TILING else 2
            assert blocks * (got.shared + 1024) <= SHARED_BYTES[architecture], what
            assert blocks * got.registers * tiling.warps * 32 <= 65536, what
            # Three steps' (more on Blackwell) before the loop, then one a turn.
            assert got.ptx.count(LOAD) >= 2 * tiling.stages, what
            if architecture == 90:
                turn = got.ptx[got.ptx.index(MMA[90]) :]
                assert turn.count(LOAD) == 2, what
            assert MMA[architecture] in got.ptx, what


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_the_look_compiles_to_wide_loads(architecture: int, tmp_path: Path) -> None:
    """With strides that are multiples of 16, as features of layers are."""
    types = {"flags": "*i32", "grad_output": "*bf16", "input": "*bf16"}
    sizes = ("tokens", "out_features", "in_features", "grad_stride", "input_stride")
    types |= dict.fromkeys(sizes, "i32")
    constants = {"ROWS": 4, "BLOCK": 512}
    kernel = finite.look_kernel
    got = compile_for(architecture, kernel, types, constants, tmp_path, types, num_warps=4)
    assert got.spilled == 0 and got.registers <= 64, got[:3]
    wide = got.ptx.count("ld.global.v4")
    assert wide and wide == got.ptx.count("ld.global"), got.ptx


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
