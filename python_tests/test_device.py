"""Where a run works, and what it says of a GPU's memory; no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piece_ops import _native
from piece_ops.training import load_model, load_task, run
from piece_ops.training.memory import peak_memory
from piece_ops.training.models import ModelError, resolve_device
from piece_ops.training.state import ResumeError

from helpers.tiny_lm import COLOURS, quick, save_tiny, write_rows


def test_memory_of_a_gpu_is_told_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = iter((300, 200))
    for name, does in (
        ("is_initialized", lambda: True),
        ("reset_peak_memory_stats", lambda: None),
        ("max_memory_allocated", lambda: next(allocated)),
    ):
        monkeypatch.setattr(torch.cuda, name, does)
    peaks: dict[str, int] = {}
    for _ in range(2):
        with peak_memory(peaks, "train"):
            pass
    assert peaks["train (GPU)"] == 300


def test_a_run_works_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is chosen, used, and part of what the run is; here both devices are the CPU."""
    real = _native.describe()
    used: list[str] = []
    source = save_tiny(tmp_path / "model")
    path = write_rows(tmp_path / "one.jsonl", COLOURS)

    def start(**more: Any) -> None:
        tasks = [(load_task("one", path), path)]
        run(str(source), tasks, quick(), tmp_path / "out", save=False, report=False, **more)

    def load(source: str, *, dtype: str, device: str) -> Any:
        used.append(device)
        return load_model(source, dtype=dtype)

    monkeypatch.setattr("piece_ops.training.work.load_model", load)
    for gpu, built, wanted, chosen in (
        (None, ["90"], "auto", "cpu"),
        ("a GPU", [], "auto", "cpu"),
        ("a GPU", ["90"], "cpu", "cpu"),
        ("a GPU", ["90"], "auto", "cuda"),
        ("a GPU", ["90"], "cuda", "cuda"),
    ):
        held = {**real, "gpu": gpu, "cuda_architectures": built}
        monkeypatch.setattr(_native, "describe", lambda held=held: held)
        assert resolve_device(wanted) == chosen
    start()
    assert used == ["cuda"]
    monkeypatch.setattr(_native, "describe", lambda: {**real, "gpu": None})
    with pytest.raises(ModelError, match="wanted cuda, but torch sees no GPU"):
        resolve_device("cuda")
    with pytest.raises(ResumeError, match='setting device was "cuda", is "cpu"'):
        start(resume=True)
    monkeypatch.setattr(
        _native, "describe", lambda: {**real, "gpu": "a GPU", "cuda_architectures": []}
    )
    with pytest.raises(ModelError, match="wanted cuda, but this build has no CUDA kernels"):
        resolve_device("cuda")
