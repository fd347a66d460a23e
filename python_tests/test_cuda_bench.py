"""The GPU benchmark without a GPU: its table, its verdicts, its answers on emulated kernels."""

from __future__ import annotations

import importlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import cuda as bench
from bench import (
    cuda_host,
    cuda_lists,
    cuda_others,
    cuda_select_topk,
    cuda_step,
    cuda_sweep,
    cuda_timing,
    harness,
    report,
)
from bench.cuda_timing import HostPeer, Peer, Plan
from bench.harness import Absent, Row
from piece_ops.backends import _cuda_runtime, cuda_full_rows

from helpers.emulated import build, emulation, load, route_cpu_tensors

# Before torch.Generator is replaced, which its annotations name.
importlib.import_module("transformers.models.llama.modeling_llama")

SIZES = (64 * 32, 128, 1, 1000, 4097)
TINY_LLAMA = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


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
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with emulation(extension), CudaMeansCpu():
        library = route_cpu_tensors()
        yield
    library._destroy()


def answers(peers: list[Peer]) -> dict[str, Any]:
    """What each of our peers returned, after its own check found nothing wrong."""
    found = {}
    for peer in peers:
        if peer.role == "ours" and "graph" not in peer.name:
            found[peer.name] = peer.run()
            assert peer.check is None or peer.check(found[peer.name]) is None, peer.name
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: cuda_lists.accumulate([100_000], False, 10),
        lambda: cuda_lists.accumulate(SIZES, True, 10),
        lambda: cuda_lists.accumulate_parts(100_000, (10, 100)),
        lambda: cuda_lists.adamw(SIZES, 100, []),
        lambda: cuda_lists.adamw_parts(100_000, 1000, (10, 100)),
        lambda: cuda_others.slots(SIZES, 100, False),
        lambda: cuda_others.slots(SIZES, 100, True),
        lambda: cuda_others.total(100_000),
        lambda: cuda_select_topk.standalone("256 distinct values", 100_000, 100),
        lambda: cuda_select_topk.standalone("Fisher-like", 100_000, 100),
        lambda: cuda_select_topk.fused(100_000, 100),
        lambda: cuda_select_topk.many((10, 50), 100_000, 100),
        lambda: cuda_select_topk.piece_s(100_000, 100),
        lambda: cuda_step.step(2, 8, 1, TINY_LLAMA),
        lambda: cuda_step.importance(2, 8, 1, TINY_LLAMA),
        lambda: cuda_sweep.full_rows(40, 72, 300, 0.05, 0.5, torch.bfloat16),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_our_answers_are_right(emulated: None, make: Callable[[], list[Peer]]) -> None:
    assert answers(make())


@pytest.mark.filterwarnings("ignore")
def test_the_host_time_of_a_plan_is_in_milliseconds(emulated: None) -> None:
    (peer,) = cuda_lists.host_time(SIZES, 100)
    assert isinstance(peer, HostPeer)
    assert 0 < peer.run() < 1000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slow", ["launches", "wait"])
def test_the_parts_of_a_call(emulated: None, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """Every call launches and reads; time spent there is found there, and nothing stays behind."""
    seconds = 0.02
    plain = cuda_host.timed

    def slower(function: Callable[..., Any], spans: list[Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if (function.__name__ == "cuda_read_words") == (slow == "wait"):
                time.sleep(seconds)
            return function(*arguments)

        return plain(call, spans)

    monkeypatch.setattr(cuda_host, "timed", slower)
    for name, run in cuda_host.calls(70_000, (1, 7)):
        parts = dict(zip(cuda_host.PARTS, cuda_host.parts_of(run, 2), strict=True))
        assert min(parts.values()) > 0, (name, parts)  # time found twice makes one negative
        assert parts[slow] > 1e6 * seconds, (name, parts)
    assert "module" not in vars(_cuda_runtime.runtime)


def test_topk_of_parts_is_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_select_topk, "PART", 1000)
    x = torch.randn(4321)
    right = cuda_select_topk.check_flat(x, 50, first_ties=False)
    assert right(cuda_select_topk.topk_of_parts(x, 50)) is None
    assert right(torch.arange(50)) is not None


# ---- the table --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_sweep_goes_both_ways(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One way computes no row whole, the other one all; the limits in use come back."""
    whole = []
    fill = cuda_full_rows.fill
    monkeypatch.setattr(cuda_full_rows, "fill", lambda *a: whole.append(a) or fill(*a))
    usual = cuda_full_rows.LEAST, cuda_full_rows.SHARE, cuda_full_rows._plans
    _, one_by_one, products = cuda_sweep.full_rows(40, 72, 300, 0.05, 1.0, torch.float32)
    one_by_one.run()
    assert not whole
    products.run()
    assert len(whole) == 1
    assert usual == (cuda_full_rows.LEAST, cuda_full_rows.SHARE, cuda_full_rows._plans)


def test_the_tilings_in_use_are_swept() -> None:
    kernel = pytest.importorskip("piece_ops.backends.triton.accumulate_per_sample_squares")
    swept = [kernel.Tiling(*shape) for shape in cuda_sweep.TILINGS]
    assert kernel.TMA_TILING in swept
    assert kernel.TMA_TILING_HALF in swept
    assert kernel.FEW_TOKENS in cuda_sweep.LENGTHS


@pytest.mark.parametrize(
    ("options", "all_plans"), [([], bench.plans), (["--sweep"], cuda_sweep.plans)]
)
def test_the_table_needs_no_gpu(
    capsys: pytest.CaptureFixture[str], options: list[str], all_plans: Callable[[], Iterator[Plan]]
) -> None:
    assert bench.main([*options, "--dry"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("    ")]
    plans = list(all_plans())
    assert len(lines) == len(plans) == len({(plan.op, plan.name) for plan in plans})
    for line, plan in zip(lines, plans, strict=True):
        assert "must move" in line or not plan.floor_bytes, line
        assert " predicted " in line, line
        assert plan.moved_bytes >= plan.floor_bytes


def ms(name: str, role: harness.Role, milliseconds: float, n_bytes: int = 0) -> Row:
    return Row(name, role, "ok", n_bytes, [milliseconds])


READ, COPY = "one read (torch.amax)", "copy of as many bytes"
GPU_8E9 = "Gaussian squared, n = 8e+09"
# What the backend is held to: the case, its n-th target, rows that meet it, one that falls short.
HELD_TO: dict[str, tuple[str, str, int, list[Row], Row]] = {
    "accumulate, bytes that must move": (
        "accumulate_squares_",
        "1e+09 bfloat16, squares",
        0,
        [ms(COPY, "floor", 1.0, 4 * 10**9), ms("piece_ops", "ours", 2.7, 10**10)],
        ms("piece_ops", "ours", 2.8, 10**10),
    ),
    "accumulate, bytes moved": (
        "accumulate_squares_",
        "Llama-8B",
        1,
        [ms(COPY, "floor", 1.0, 4 * 10**9), ms("piece_ops", "ours", 26.7, 1)],
        ms("piece_ops", "ours", 26.9, 1),
    ),
    "select, one read": (
        "select_topk",
        "Gaussian squared, n = 1e+09 float32, k = 0.1 %",
        0,
        [ms(READ, "floor", 1.0), ms("piece_ops", "ours", 1.14)],
        ms("piece_ops", "ours", 1.16),
    ),
    "select 8e9, torch.topk of parts": (
        "select_topk",
        GPU_8E9,
        1,
        [ms(cuda_select_topk.TOPK_PARTS, "peer", 4.1), ms("piece_ops", "ours", 1.0)],
        ms("piece_ops", "ours", 1.1),
    ),
    "fused": (
        "select_topk",
        "fused",
        0,
        [
            ms(READ, "floor", 1.0),
            ms(cuda_select_topk.WITHOUT, "ours", 3.0),
            ms(cuda_select_topk.TOGETHER, "ours", 3.19),
        ],
        ms(cuda_select_topk.TOGETHER, "ours", 3.21),
    ),
    "hostile": (
        "select_topk",
        "256 distinct values",
        0,
        [ms(READ, "floor", 1.0), ms("piece_ops", "ours", 2.4)],
        ms("piece_ops", "ours", 2.6),
    ),
    "dense AdamW": (
        "sparse_adamw_",
        "Llama-8B, k",
        0,
        [ms(cuda_lists.DENSE, "peer", 51.0), ms("piece_ops, kept plan", "ours", 1.0)],
        ms("piece_ops, kept plan", "ours", 1.1),
    ),
    "host time": (
        "sparse_adamw_",
        "host time",
        0,
        [ms("piece_ops, kept plan, a step on the host", "ours", 0.019)],
        ms("piece_ops, kept plan, a step on the host", "ours", 0.021),
    ),
} | {
    f"10,000 tensors, {op}": (
        op,
        "10,000 tensors",
        0,
        [ms("10 tensors", "ours", 1.0), ms("10,000 tensors", "ours", 1.2)],
        ms("10,000 tensors", "ours", 1.4),
    )
    for op in ("accumulate_squares_", "select_topk", "sparse_adamw_")
}


def verdict(plan: Plan, number: int, rows: list[Row]) -> str:
    lines = list(bench_records(plan, rows))
    targets = [line for line in lines if line["kind"] == "target"]
    return str(targets[number]["verdict"])


def bench_records(plan: Plan, rows: list[Row]) -> Iterator[dict[str, Any]]:
    return cuda_timing.records(plan.name, plan.case([]), rows, plan.predict)


@pytest.mark.parametrize("name", HELD_TO)
def test_every_promise_has_a_verdict(name: str) -> None:
    op, words, number, rows, slow = HELD_TO[name]
    plan = next(p for p in bench.plans() if p.op == op and p.name.startswith(words))
    assert verdict(plan, number, rows) == "met"
    slower = [slow if row.peer == slow.peer else row for row in rows]
    assert verdict(plan, number, slower) == "short"
    for missing in rows:
        absent = Row(missing.peer, missing.role, "absent: no", 0)
        some = [absent if row is missing else row for row in rows]
        assert verdict(plan, number, some) == "not measured"


# ---- a run ------------------------------------------------------------------------------------


class FixedClock(cuda_timing.Clock):
    def milliseconds(self, run: Callable[[], Any]) -> float:
        run()
        return 2.0


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU at all")


def failing(error: Exception) -> Callable[[], Any]:
    def run() -> Any:
        raise error

    return run


def plan(name: str, build: Callable[[], list[Peer]]) -> Plan:
    target = harness.Target("time", harness.time_ratio("fine", "read"), 1.0, at_most=True)
    return Plan("op", name, 1, 10, [target], build)


def test_a_run_is_rows_and_verdicts_that_a_report_can_read(fake_gpu: None, tmp_path: Path) -> None:
    """A failure is a row, the rest goes on; the JSON is that of the other benchmarks."""
    peers = [
        Peer("read", lambda: 1, role="floor"),
        Peer("fine", lambda: 1, role="ours"),
        Peer("wrong", int, lambda _: "bad", role="ours"),
        Peer("broken", failing(ValueError("no")), role="ours"),
        Peer("too large", failing(RuntimeError("no room\nat all")), role="peer"),
        Peer("missing", failing(Absent("no header")), role="peer"),
        HostPeer("host", lambda: 0.25, role="ours"),
    ]
    plans = [plan("unbuilt", failing(ValueError("no"))), plan("built", lambda: peers)]
    path = tmp_path / "cuda.jsonl"
    done = cuda_timing.run_plans(plans, repeats=3, out=path, seconds=60, clock=FixedClock())
    assert done == 1
    unbuilt, built = report.load([path]).values()
    assert [(x["kind"], x.get("status"), x.get("verdict")) for x in unbuilt] == [
        ("row", "failed: ValueError: no", None),
        ("target", None, "not measured"),
    ]
    rows = {x["peer"]: x for x in built if x["kind"] == "row"}
    assert {name: x["status"] for name, x in rows.items()} == {
        "read": "ok",
        "fine": "ok",
        "wrong": "wrong: bad",
        "broken": "failed: ValueError: no",
        "too large": "absent: RuntimeError: no room",
        "missing": "absent: Absent: no header",
        "host": "ok",
    }
    assert rows["fine"]["p50_ms"] == 2.0 and rows["fine"]["repeats"] == 3
    assert rows["host"]["p50_ms"] == 0.25
    assert [x["verdict"] for x in built if x["kind"] == "target"] == ["met"]
    page = report.page(report.load([path]))
    assert "no GPU at all" in page and "op, CUDA: built" in page and "| met |" in page


def test_when_the_time_is_spent_the_rest_says_so(fake_gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "cuda.jsonl"
    plans = [plan("late", failing(AssertionError("must not be built")))]
    assert cuda_timing.run_plans(plans, repeats=1, out=path, seconds=0.0) == 0
    row, target = (json.loads(line) for line in path.read_text().splitlines())
    assert row["status"] == "absent: the 0 s of this run were spent"
    assert target["verdict"] == "not measured"
