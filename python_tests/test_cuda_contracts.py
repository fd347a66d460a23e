"""The CPU's contract tests on emulated CUDA kernels, plain and under sanitizers; barriers left out.

Plain, every test runs as it is. Under AddressSanitizer with UBSan, and under ThreadSanitizer (the
detector of races inside a block), every test function runs and every value of every parameter
occurs (helpers/covering.py): each dtype, distribution, algorithm, kind of score and wrong argument.
Fewer are combinations, and what a case holds of large numbers (helpers/cases.py, ONE_IN).
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.covering import cover
from helpers.emulated import ROOT, build

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
)

CONTRACTS = {
    "small": ("accumulate_squares", "sparse_adamw", "gather", "scatter", "total"),
    "sampled": ("sampled_weight_grad",),
    "select_topk": ("select_topk", "select_topk_errors"),
}
# What everything large is divided by: 140, 120 and 130 s of one core are left (on a busy machine).
ONE_IN = {"plain": 1, "address": 4, "thread": 16}
FEWEST_LAUNCHES = {"plain": 1000, "address": 300, "thread": 100}


def preload(kind: str) -> dict[str, str]:
    """The environment in which this Python can load an extension built with a sanitizer."""
    names = {"plain": (), "address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
    paths = [
        subprocess.run(
            [os.environ.get("CXX", "g++"), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in names[kind]
    ]
    return {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        # Names in a report cost seconds, and a mutant's child cannot start the symbolizer.
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:die_after_fork=0:symbolize=0"
        ":atexit_sleep_ms=0",
    }


def start(
    kind: str, arguments: list[str], seconds: int, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **preload(kind)} if kind != "plain" else dict(os.environ)
    environment |= {
        "PIECE_OPS_EMULATION": str(build(kind)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests")]),
        "OMP_NUM_THREADS": "1",
        "PIECE_OPS_SIMT_SEED": "29",
        **settings,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=seconds,
    )


def contracts(kind: str, group: str) -> subprocess.CompletedProcess[str]:
    """Run python_tests/test_<op>.py with CPU tensors routed to emulated kernels."""
    files = [f"python_tests/test_{name}.py" for name in CONTRACTS[group]]
    command = ["-m", "pytest", "-p", "helpers.emulated", "-p", "no:cacheprovider", "-W", "ignore"]
    settings = {"PIECE_OPS_ONE_IN": str(ONE_IN[kind])}
    if kind != "plain":
        command += ["-p", "helpers.covering"]
        settings["PIECE_OPS_SIMT_BLOCKS"] = "2"  # races are looked for inside blocks
    return start(kind, [*command, *files], 1800, **settings)


@pytest.mark.parametrize("group", CONTRACTS)
def test_the_contract_tests_hold(group: str) -> None:
    """Plain and under sanitizers, two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda kind: contracts(kind, group), ONE_IN))
    for kind, done in zip(ONE_IN, runs, strict=True):
        what = f"{kind}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        assert done.returncode == 0, what
        launches = re.search(r"emulated launches: (\d+)", done.stdout)
        assert launches and int(launches[1]) > FEWEST_LAUNCHES[kind], what


def test_no_value_of_a_parameter_is_left_out() -> None:
    grid = [{"a": a, "b": b} for a in "xyz" for b in range(5)]
    kept = [grid[i] for i in cover(grid)]
    assert len(kept) == 5
    assert {case["a"] for case in kept} == set("xyz")
    assert {case["b"] for case in kept} == set(range(5))


WORKER = "python_tests/helpers/emulated_worker.py"


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(kind: str) -> None:
    """AddressSanitizer and UBSan; ThreadSanitizer as the detector of races inside a block."""
    done = start(kind, [WORKER, "run"], 600)
    assert done.returncode == 0, done.stderr[-6000:]


def barriers() -> list[str]:
    """<file>:<line> of every barrier, and wait for asynchronous copies, of csrc/cuda."""
    found = []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if re.search(r"__syncthreads\(\)|__syncwarp\(|__pipeline_wait_prior\(", code):
                found.append(f"{path.name}:{number}")
    return found


def test_every_barrier_is_needed() -> None:
    """Each one left out in turn: a wrong result, a deadlock or ThreadSanitizer's report."""
    sites = barriers()
    assert len(sites) >= 2
    # Controls: where there is no barrier, nothing is left out, and the cases run through.
    controls = ["total.cu:1", "select_topk_emit.cu:1"]
    done = start("thread", [WORKER, "mutants", *controls, *sites], 900)
    assert done.returncode == 0, done.stderr[-4000:]
    ends = json.loads(done.stdout.strip().splitlines()[-1])
    assert list(ends) == [*controls, *sites]
    assert [ends.pop(site) for site in controls] == [99, 99], done.stderr[-4000:]
    unnoticed = {site: end for site, end in ends.items() if end in (0, 99)}
    assert not unnoticed, f"left out without notice (99: never reached): {unnoticed}"
