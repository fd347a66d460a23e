"""How cases on a GPU are timed: CUDA events around whole calls, host time included.

Every peer's answer is checked before it is timed; then rounds, each of which calls every peer once
with the L2 cache overwritten before it. Medians; peers that take long are called fewer times.
Targets, rows and JSON lines are those of ``bench.harness`` and ``python -m bench``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import harness, machine
from bench.__main__ import records, show, size, write
from bench.harness import Absent, Peer, Target

READ_GB_PER_S = 4300.0  # what one H200 reads, measured by others; predictions only
COPY_GB_PER_S = 4000.0
L2_BYTES = 256 << 20  # more than any L2 cache has
Run = Callable[[], Any]
Rows = dict[str, harness.Row]


@dataclass
class HostPeer(Peer):
    """Timed by itself, on the host's clock: ``run`` returns milliseconds."""


@dataclass
class Plan:
    """A case to be built: what must be moved, what ours moves, and what it is held to.

    ``floor_bytes``: what the op must read and write at least; 0: it is about the host alone.
    ``our_bytes``: what our kernels move (None: as much). ``more_ms``: what is predicted on top.
    """

    op: str
    name: str
    n: int
    floor_bytes: int
    targets: list[Target]
    build: Callable[[], list[Peer]]
    our_bytes: int | None = None
    gb_per_s: float = COPY_GB_PER_S
    more_ms: float = 0.01  # launches
    dtype: str = "bfloat16"

    @property
    def moved_bytes(self) -> int:
        return self.floor_bytes if self.our_bytes is None else self.our_bytes

    @property
    def predicted_ms(self) -> float:
        return self.moved_bytes / self.gb_per_s / 1e6 + self.more_ms

    def predict(self, line: dict[str, Any], gb_per_s: float | None) -> float | None:
        """What `bench.__main__.records` writes beside a row: ours as a call, as predicted here."""
        return self.predicted_ms if line["peer"] == "piece_ops" else None

    def __str__(self) -> str:
        """What ``--dry`` prints: bytes, floor, prediction (one H200), then a line a target."""
        text = f"{self.op}: {self.name}: "
        if self.floor_bytes:
            floor_ms = self.floor_bytes / self.gb_per_s / 1e6
            text += f"must move {size(self.floor_bytes)}, floor {floor_ms:.3f} ms; "
            text += f"moves {size(self.moved_bytes)}, predicted {self.predicted_ms:.3f} ms"
        else:
            text += f"no bytes, host only; predicted {self.predicted_ms:.3f} ms"
        for target in self.targets:
            sign = "<=" if target.at_most else ">="
            text += f"\n    target: {target.text} {sign} {target.limit:g} {target.unit}"
        return text

    def case(self, peers: list[Peer]) -> harness.Case:
        op = f"{self.op}, CUDA"  # its own section beside the CPU's in a report
        return harness.Case(
            op, self.dtype, self.n, self.floor_bytes, peers, targets=list(self.targets)
        )


# ---- peers that many cases have ------------------------------------------------------------------


def reader(tensors: Sequence[Tensor]) -> Peer:
    n_bytes = sum(t.numel() * t.element_size() for t in tensors)
    return Peer(
        "one read (torch.amax)", lambda: [t.amax() for t in tensors], role="floor", n_bytes=n_bytes
    )


def copier(n_bytes: int) -> Peer:
    """Reads and writes n_bytes together, through buffers of at most 8 GB."""
    times = max(1, -(-n_bytes // 8_000_000_000))
    source = torch.empty(max(1, n_bytes // times // 2), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def run() -> Any:
        for _ in range(times):
            target.copy_(source)

    moved = 2 * times * source.numel()
    return Peer("copy of as many bytes", run, role="floor", n_bytes=moved)


def optional(make: Callable[[], Peer], name: str) -> Peer:
    """A peer that may be absent: it then says why when it is run."""
    try:
        return make()
    except (RuntimeError, OSError) as error:
        return absent(name, str(error))


def absent(name: str, why: str) -> Peer:
    def run() -> Any:
        raise Absent(why)

    return Peer(name, run)


def graphed(name: str, run: Run) -> Peer:
    """The time on the device alone: a call captured into a CUDA graph, replayed."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> Any:
        if not graphs:
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs.append(graph)
        graphs[0].replay()

    return Peer(name, replay, role="ours")


def count_launches(run: Run) -> float | None:
    """Kernels, copies and fills that a call gives the device; None where nothing tells."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in seen.events()) or None


# ---- targets -------------------------------------------------------------------------------------


def one_read(limit: float, name: str = "piece_ops", what: str = "time / one read") -> Target:
    return Target(what, harness.over_floor(name), limit, at_most=True)


def copy_share(text: str, n_bytes: int, limit: float = 90.0, name: str = "piece_ops") -> Target:
    """Percent of the copy's GB/s, where `name` is held to have moved `n_bytes`."""

    def measure(rows: Rows) -> float | None:
        row, bandwidth = rows.get(name), harness.best_bandwidth(list(rows.values()))
        return (
            n_bytes / row.p50_ms / 1e4 / bandwidth if row and row.times_ms and bandwidth else None
        )

    return Target(text, measure, limit, at_most=False, unit="%")


def no_slower(small: str, large: str, text: str) -> Target:
    """As many elements in both, so times compare as they are."""
    return Target(text, harness.time_ratio(small, large), 1.3, at_most=True)


# ---- timing --------------------------------------------------------------------------------------


@dataclass
class Clock:
    """CUDA events around a call; a test puts another one in its place."""

    flush: list[Tensor] = field(default_factory=list)

    def milliseconds(self, run: Run) -> float:
        if not self.flush:
            self.flush.append(torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda"))
        self.flush[0].zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end))


def first_call(peer: Peer, case: harness.Case) -> harness.Row:
    """Run once: check the answer, measure memory; the row says what went wrong."""
    row = harness.Row(peer.name, peer.role, "ok", peer.n_bytes or case.n_bytes, note=peer.note)
    try:
        if peer.prepare:
            peer.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = peer.run()
        torch.cuda.synchronize()
        row.extra_bytes = torch.cuda.max_memory_allocated() - before
        wrong = peer.check(answer) if peer.check else None
        if wrong:
            row.status = f"wrong: {wrong}"
    except (Absent, torch.cuda.OutOfMemoryError) as error:
        row.status = f"absent: {first_line(error)}"
    except Exception as error:  # what somebody else's way cannot do is no failure of this run
        is_theirs = peer.role == "peer" and isinstance(error, RuntimeError)
        row.status = f"{'absent' if is_theirs else 'failed'}: {first_line(error)}"
    return row


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def rounds(milliseconds: float, most: int) -> int:
    """Timed calls of a peer that takes this long."""
    for limit, count in ((50.0, most), (250.0, 7), (1000.0, 3)):
        if milliseconds < limit:
            return min(count, most)
    return 1


def run_case(case: harness.Case, repeats: int, clock: Clock) -> list[harness.Row]:
    """Check all peers of a case, warm them up, then time them in turns."""

    def timed(peer: Peer) -> float:
        return float(peer.run()) if isinstance(peer, HostPeer) else clock.milliseconds(peer.run)

    rows = [first_call(peer, case) for peer in case.peers]
    pairs = list(zip(case.peers, rows, strict=True))
    counts = [rounds(timed(peer), repeats) if row.status == "ok" else 0 for peer, row in pairs]
    for number in range(max(counts, default=0)):
        for (peer, row), count in zip(pairs, counts, strict=True):
            if number < count:
                row.times_ms.append(timed(peer))
    return rows


def run_plan(plan: Plan, repeats: int, clock: Clock) -> list[dict[str, Any]]:
    """Build and measure; the JSON lines, also when nothing could be built."""
    try:
        case = plan.case(plan.build())
        rows = run_case(case, repeats, clock)
    except Exception as error:  # the other cases are wanted all the same
        return unmeasured(plan, f"failed: {first_line(error)}")
    return list(records(plan.name, case, rows, plan.predict))


def unmeasured(plan: Plan, status: str) -> list[dict[str, Any]]:
    """A row that says why, and targets that are not measured."""
    row = harness.Row("piece_ops", "ours", status, plan.floor_bytes)
    return list(records(plan.name, plan.case([]), [row], plan.predict))


def run_plans(
    plans: Iterable[Plan],
    *,
    repeats: int,
    out: Path | None,
    seconds: float,
    clock: Clock | None = None,
) -> int:
    """Measure and show every case; 1 if an answer was wrong or a call failed.

    After `seconds` no further case is begun: those that remain say so.
    """
    clock = clock or Clock()
    common = {**machine.describe(), "gpu": torch.cuda.get_device_name(), "quick": False}
    lines: list[dict[str, Any]] = []
    started, result = time.monotonic(), 0
    for plan in plans:
        if time.monotonic() - started < seconds:
            of_plan = run_plan(plan, repeats, clock)
        else:
            of_plan = unmeasured(plan, f"absent: the {seconds:g} s of this run were spent")
        show(of_plan)
        bad = [x for x in of_plan if x.get("status", "").startswith(("wrong", "failed"))]
        result |= bool(bad)
        lines += [{**line, **common} for line in of_plan]
        if out:
            write(out, lines)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{time.monotonic() - started:.0f} s")
    return result
