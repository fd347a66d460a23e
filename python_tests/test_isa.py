"""Every instruction set gives the bits of the portable one, and the forced one is the live one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from piece_ops import _native

WORKER = Path(__file__).parent / "helpers" / "isa_worker.py"
NAMES = ("portable", "avx2", "avx512", "amx")
LIVE = "from piece_ops import _native; print(_native.describe()['isa'])"
SUPPORTED = _native.extension().supported_isas()


def run(isa: str | None, code: list[str]) -> subprocess.CompletedProcess[str]:
    """A Python process with PIECE_OPS_ISA set to `isa`, or not set."""
    env = {key: value for key, value in os.environ.items() if key != "PIECE_OPS_ISA"}
    if isa is not None:
        env["PIECE_OPS_ISA"] = isa
    return subprocess.run(
        [sys.executable, *code], env=env, capture_output=True, text=True, timeout=600
    )


@cache
def report(isa: str, threads: int) -> dict[str, Any]:
    done = run(isa, [str(WORKER), str(threads)])
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_portable_one_is_always_there() -> None:
    assert SUPPORTED[0] == "portable"
    assert set(SUPPORTED) <= set(NAMES)


@pytest.mark.parametrize("isa", NAMES)
def test_the_forced_one_is_live(isa: str) -> None:
    if isa not in SUPPORTED:
        pytest.skip(f"this CPU or build has no {isa}")
    done = run(isa, ["-c", LIVE])
    assert done.stdout.strip() == isa, done.stderr


def test_without_the_variable_the_best_one_is_live() -> None:
    for isa in (None, ""):
        done = run(isa, ["-c", LIVE])
        assert done.stdout.strip() == SUPPORTED[-1], done.stderr


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "portable "])
def test_an_unknown_name_is_an_error(isa: str) -> None:
    code = "import torch, piece_ops; piece_ops.select_topk(torch.ones(3), 1)"
    done = run(isa, ["-c", code])
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ValueError: piece_ops: PIECE_OPS_ISA must be one of" in last, done.stderr
    assert "portable" in last and f"got '{isa}'" in last, last


@pytest.mark.parametrize("isa", [name for name in NAMES if name != "portable"])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_as_the_portable_one(isa: str, threads: int) -> None:
    if isa not in SUPPORTED:
        pytest.skip(f"this CPU or build has no {isa}")
    got, want = report(isa, threads), report("portable", 1)
    assert (got["isa"], want["isa"]) == (isa, "portable")
    assert got["digests"] == want["digests"]
