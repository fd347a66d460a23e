"""How rows on a GPU are timed: CUDA events around whole calls, host time included.

Every peer's answer is checked before it is timed; the L2 cache is overwritten before each call;
medians of ``--repeats``. The first peer of a row is a plain read or copy of the same bytes in the
same run, the denominator of the others. A peer that fails is a line that says so, and the next one
runs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.harness import Absent

READ_GB_PER_S = 4300.0  # what one H200 reads, measured by others; predictions only
COPY_GB_PER_S = 4000.0
Run = Callable[[], Any]


@dataclass
class Peer:
    """One way to the answer. ``check`` says what is wrong with it (None: right).

    An answer that is a dict holds numbers that the peer measured itself; the line takes them over.
    """

    name: str
    run: Run
    check: Callable[[Any], str | None] | None = None


@dataclass
class Row:
    """What must be moved at least, what ours moves and is held to, and how to set it up."""

    op: str
    name: str
    floor_bytes: int
    target: str
    build: Callable[[], list[Peer]]
    our_bytes: int | None = None  # None: as many as the floor
    gb_per_s: float = COPY_GB_PER_S
    more_ms: float = 0.01  # launches

    @property
    def floor_ms(self) -> float:
        return self.floor_bytes / self.gb_per_s / 1e6

    @property
    def predicted_ms(self) -> float:
        n_bytes = self.floor_bytes if self.our_bytes is None else self.our_bytes
        return n_bytes / self.gb_per_s / 1e6 + self.more_ms

    def __str__(self) -> str:
        return (
            f"{self.op}: {self.name}: floor {self.floor_bytes / 1e9:.2f} GB {self.floor_ms:.2f} "
            f"ms, predicted {self.predicted_ms:.2f} ms; {self.target}"
        )


# ---- peers that many rows have -------------------------------------------------------------------


def reader(tensors: Sequence[Tensor]) -> Peer:
    return Peer("one read (torch.amax)", lambda: [t.amax() for t in tensors])


def copier(n_bytes: int) -> Peer:
    """Reads and writes n_bytes together, through buffers of at most 8 GB."""
    times = max(1, -(-n_bytes // 8_000_000_000))
    source = torch.empty(n_bytes // times // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def run() -> Any:
        for _ in range(times):
            target.copy_(source)

    return Peer("copy of as many bytes", run)


def optional(make: Callable[[], Peer], name: str) -> Peer:
    """A peer that may be absent: it then says why when it is run."""
    try:
        return make()
    except (RuntimeError, OSError) as error:
        text = str(error)

        def absent() -> Any:
            raise Absent(text)

        return Peer(name, absent)


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

    return Peer(name, replay)


# ---- timing --------------------------------------------------------------------------------------


def time_ms(run: Run, repeats: int) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def run_row(row: Row, repeats: int) -> Iterator[dict[str, Any]]:
    """Each peer's line: status, time, GB/s of the floor's bytes, extra memory."""
    head = {"op": row.op, "case": row.name, "device": torch.cuda.get_device_name()}
    try:
        peers = row.build()
    except Exception as error:  # the other rows are wanted all the same
        yield {**head, "peer": "all", "status": _failed(error)}
        return
    read_ms = None
    for peer in peers:
        line: dict[str, Any] = {**head, "peer": peer.name, "status": "ok"}
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            answer = peer.run()
            torch.cuda.synchronize()
            line["extra_bytes"] = torch.cuda.max_memory_allocated() - before
            wrong = peer.check(answer) if peer.check else None
            if isinstance(answer, dict):
                line.update(answer)
            del answer
            if wrong:
                line["status"] = f"wrong: {wrong}"
            else:
                line["p50_ms"] = round(time_ms(peer.run, repeats), 4)
                read_ms = read_ms or line["p50_ms"]
                line["over_one_read"] = round(line["p50_ms"] / read_ms, 3)
                line["gb_per_s"] = round(row.floor_bytes / line["p50_ms"] / 1e6, 1)
        except (Absent, torch.cuda.OutOfMemoryError) as error:
            line["status"] = f"absent: {str(error).splitlines()[0]}"
        except Exception as error:
            line["status"] = _failed(error)
        yield line


def _failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}"


def run_rows(rows: Iterable[Row], *, is_dry: bool, repeats: int, out: Path | None) -> int:
    """Print every row and, if not dry, the lines of its peers; 1 if one was wrong or failed."""
    result = 0
    measured_with = machine.describe()
    for row in rows:
        print(row, flush=True)
        if is_dry:
            continue
        for line in run_row(row, repeats):
            skip = ("op", "case", "device")
            print("  ", {k: v for k, v in line.items() if k not in skip}, flush=True)
            result |= line["status"].startswith(("wrong", "failed"))
            if out:
                with out.open("a") as file:
                    file.write(json.dumps({**line, **measured_with}) + "\n")
        torch.cuda.empty_cache()
    return result
