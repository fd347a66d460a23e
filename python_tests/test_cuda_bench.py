"""The GPU benchmark without a GPU: its table, and every peer's answer on emulated kernels."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import cuda as bench
from bench import cuda_select_topk, cuda_timing
from bench.cuda_timing import Peer

from helpers.emulated import build, cuda_implementations, emulation, load

SIZES = (64 * 32, 128, 1, 1000, 4097)


class CudaMeansCpu(TorchFunctionMode):
    """Whatever is to be made on a CUDA device is made on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    if platform.machine() != "x86_64":
        pytest.skip("the emulation switches stacks in x86-64 assembler")
    return load(build("plain"))


@pytest.fixture
def emulated(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """piece_ops.<op> as the benchmark calls it runs emulated kernels."""
    ops = cuda_implementations()
    library = torch.library.Library("piece_ops", "IMPL")
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with emulation(extension), CudaMeansCpu():
        for op, function in ops.items():
            library.impl(op, function, "CPU", allow_override=True)
        yield
    library._destroy()


def answers(peers: list[Peer]) -> dict[str, Any]:
    """What each of our peers returned, after its own check found nothing wrong."""
    found = {}
    for peer in peers:
        if peer.name.startswith(("piece_ops", "100 steps", "accumulation")):
            found[peer.name] = peer.run()
            assert peer.check is None or peer.check(found[peer.name]) is None, peer.name
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: bench.accumulate([100_000], False),
        lambda: bench.accumulate(SIZES, True),
        lambda: bench.adamw(SIZES, 100),
        lambda: bench.slots(SIZES, 100, False),
        lambda: bench.slots(SIZES, 100, True),
        lambda: bench.total(100_000),
        lambda: cuda_select_topk.standalone("256 distinct values", 100_000, 100),
        lambda: cuda_select_topk.fused(100_000, 100),
        lambda: cuda_select_topk.many(50, 100_000, 100),
        lambda: cuda_select_topk.piece_s(100_000, 100),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_our_answers_are_right(emulated: None, make: Callable[[], list[Peer]]) -> None:
    assert answers(make())


@pytest.mark.filterwarnings("ignore")
def test_the_host_time_of_a_plan_is_a_number_of_its_line(emulated: None) -> None:
    (answer,) = answers(bench.host_time(SIZES, 100)).values()
    assert answer["host_us_a_step"] > 0


def test_the_table_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len([*bench.rows(), *cuda_select_topk.rows()]) >= 18
    for line in lines:
        assert " GB " in line and " ms, predicted " in line, line


def test_a_failure_is_a_line_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise ValueError("no")

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(cuda_timing, "time_ms", lambda run, repeats: 2.0)
    peers = [Peer("broken", broken), Peer("fine", lambda: 1), Peer("wrong", int, lambda _: "bad")]
    rows = [
        cuda_timing.Row("op", "a", 1, "", broken),
        cuda_timing.Row("op", "b", 1, "", lambda: peers),
    ]
    assert cuda_timing.run_rows(rows, is_dry=False, repeats=1, out=None) == 1
    out = capsys.readouterr().out
    assert out.count("failed: ValueError: ['no']") == 2 and "wrong: bad" in out
    assert "'peer': 'fine', 'status': 'ok', 'p50_ms': 2.0" in out.replace("'extra_bytes': 0, ", "")
