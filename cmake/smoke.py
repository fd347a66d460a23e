"""Installs built files, each into an empty environment, and tries what a user would try first.

``python cmake/smoke.py [--torch VERSION] FILE ...`` with what ``make wheel`` made. A wheel goes to
the Python of its tag, if that is on PATH, and is installed and run with no compiler on PATH. The
last lines say what went well, what failed, and which wheels had no Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = ("import torch, piece_ops", "import piece_ops, torch", "import numpy, piece_ops")


def python_of(file: Path) -> str | None:
    """The interpreter that a file is for: that of a wheel's tag, any one for an sdist."""
    tag = re.search(r"-cp3(\d+)-cp3\d+-", file.name)
    if tag is None or int(tag[1]) == sys.version_info[1]:
        return sys.executable
    return shutil.which(f"python3.{tag[1]}")


def install_and_try(file: Path, python: str, torch: str) -> None:
    """In a folder that is gone afterwards; raises CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="piece_ops-smoke-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = f"{folder}/bin/python"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={torch}" if torch else "torch", "numpy"], check=True)
        if file.suffix == ".whl":  # nothing but the environment itself: no compiler, no CMake
            environment["PATH"] = f"{folder}/bin"
        begin = time.perf_counter()
        subprocess.run([*pip, str(file)], check=True, env=environment)
        print(f"installed in {time.perf_counter() - begin:.0f} s", flush=True)
        own = [inside, str(Path(__file__).resolve()), "--here"]
        for first in IMPORTS:
            subprocess.run([*own, first], check=True, env=environment, cwd=folder)
        for command in ([inside, "-m", "piece_ops", "info"], [f"{folder}/bin/piece-ops", "info"]):
            subprocess.run(command, check=True, env=environment, cwd=folder)


def try_here(first: str) -> None:
    """What an installed piece_ops must do, after these imports."""
    exec(first)
    import numpy as np
    import torch

    import piece_ops

    assert Path(piece_ops.__file__).is_relative_to(sys.prefix), piece_ops.__file__

    scores = np.random.default_rng(0).random(3_000_000, dtype=np.float32)
    wanted = np.sort(np.argsort(-scores, kind="stable")[:3000])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        before = len(os.listdir("/proc/self/task"))
        top = piece_ops.select_topk(scores, 3000)
        assert isinstance(top.indices, np.ndarray) and (top.indices == wanted).all()
    # Threads do start, and are torch's own: there is one OpenMP runtime in the process.
    assert len(os.listdir("/proc/self/task")) > before - 1 >= 1
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if re.search(r"lib[gi]?omp", line)}
    assert len(runtimes) == 1, f"wanted one OpenMP runtime, got {sorted(runtimes)}"

    model = torch.nn.Linear(64, 64).to(torch.bfloat16)
    start = model.weight.detach().clone()
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    selection = piece_ops.estimate(
        model, [{"x": x}], density=0.01, loss_fn=lambda m, batch: m(batch["x"]).square().mean()
    )
    wrapped = piece_ops.PieceModel(model, selection)
    optimizer = piece_ops.SparseAdamW(wrapped.parameters(), lr=0.1)
    wrapped.model(x).square().mean().backward()
    optimizer.step()
    moved = (model.weight.detach() != start).flatten().nonzero().flatten().tolist()
    chosen = selection.indices["weight"].tolist() if "weight" in selection.indices else []
    assert moved and set(moved) <= set(chosen), (moved, chosen)
    print(f"ok: {first}; OpenMP {runtimes.pop()}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="wheels and an sdist")
    parser.add_argument("--torch", default="", metavar="VERSION", help="default: the newest")
    parser.add_argument("--here", metavar="IMPORTS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        try_here(given.here)
        return 0
    if not given.files:
        parser.error("wanted at least one file")
    verdicts = []
    for file in (file.resolve() for file in given.files):
        python = python_of(file)
        print(f"\n{file.name}", flush=True)
        if python is None:
            verdicts.append((file, "not tried: its Python is not on PATH"))
            continue
        try:
            install_and_try(file, python, given.torch)
            verdicts.append((file, "ok"))
        except subprocess.CalledProcessError as error:
            verdicts.append((file, f"FAILED: {error}"))
    print()
    for file, verdict in verdicts:
        print(f"{file.name} ({file.stat().st_size / 1e6:.2f} MB): {verdict}")
    return any(verdict.startswith("FAILED") for _, verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
