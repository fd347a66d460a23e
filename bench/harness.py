"""One benchmark case: build the inputs once, check every peer's answer, then time them in turns.

What is measured, and how:

- A case has peers of four roles: ``ours``, ``peer`` (somebody else's way to the same answer),
  ``floor`` (a plain read or copy of the same memory, which says what bandwidth there is) and
  ``bound`` (a part of the work that no way can do without; it says nothing about bandwidth).
- The first call of each peer is checked against the reference and measures its extra memory: free
  heap pages are handed back, the high-water mark of the resident set is reset, and what the mark
  rises above the resident set is the peer's scratch and result. A wrong peer is reported and not
  timed; a peer that cannot run is a row that says why.
- Then a round to warm up, since the first calls each began with the heap's pages handed back (not
  of peers whose first call took a second, or as long as the case says), and timed rounds: each
  calls every peer once, so that a slow phase of the machine hits all alike. Median, 20th and 80th
  percentile. A peer gets as many rounds as fit into a few seconds; one whose first call took longer
  than these is not called again: that call is its time. Each row has its count.
- A row says how many bytes its op must move, hence GB/s, and the share of the bandwidth that the
  best floor of the same case and run reached.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

Role = Literal["ours", "peer", "floor", "bound"]
MOST_ROUNDS = 11
LONG = 1.0  # seconds of a first call after which another one only to warm up is too dear
# Of the machine's memory, by one run. A machine without swap ends the process that asks for the
# last of it, and with that a run of minutes.
MOST_MEMORY = 0.7
T = TypeVar("T")


class Absent(Exception):
    """Raised by a peer's function when it cannot run here; the text says why."""


@dataclass
class Peer:
    """One way to do the work of a case.

    ``check`` gets what ``run`` returned and says what is wrong with it (None: right). ``reset``
    is called before each run, not timed; ``prepare`` once before the first (to compile).
    ``n_bytes``: if other than the case's. ``at``: where in a sweep this row stands: ``x``, and what
    of the case's n, k, tensors and threads it changes.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], str | None] | None = None
    role: Role = "peer"
    reset: Callable[[], None] | None = None
    prepare: Callable[[], None] | None = None
    n_bytes: int | None = None
    note: str = ""
    at: dict[str, Any] = field(default_factory=dict)


@dataclass
class Target:
    """One promise: a number computed from the rows (None: cannot be), and its limit."""

    text: str
    measure: Callable[[dict[str, Row]], float | None]
    limit: float
    at_most: bool
    unit: str = "x"


@dataclass
class Case:
    """Inputs built, ready to run. ``n_bytes``: what the op must read and write at least.

    ``k``: how many of the n elements are selected (0: none are); ``tensors``: in how many they lie.
    ``measured``: rows of a case whose peers cannot be in memory together, made with it.
    ``peer_seconds``: what the timed calls of one peer may take together; ``least_rounds``: how many
    it gets all the same. With 1 a first call that takes longer is the result, cold as it is.
    ``long``: see `LONG`; more where calls of seconds need their gigabytes of heap warm, too.

    The module of an op has ``cases(quick)``: names, each with a function that builds the case, so
    that one case's inputs are gone before the next one's are made.
    """

    op: str
    dtype: str
    n: int
    n_bytes: int
    peers: list[Peer]
    targets: list[Target] = field(default_factory=list)
    measured: list[Row] = field(default_factory=list)
    peer_seconds: float = 4.0
    least_rounds: int = 1
    long: float = LONG
    k: int = 0
    tensors: int = 1


@dataclass
class Row:
    """The result of one peer in one case; times in milliseconds; ``figures``: other numbers."""

    peer: str
    role: Role
    status: str
    n_bytes: int
    times_ms: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    at: dict[str, Any] = field(default_factory=dict)

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.times_ms)

    @property
    def gb_per_s(self) -> float:
        return self.n_bytes / self.p50_ms / 1e6

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.times_ms)
        return ordered[round(share * (len(ordered) - 1))]


# ---- memory -----------------------------------------------------------------------------------


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise Absent(f"/proc/self/status has no {name}")


def hand_back() -> None:
    """Give the system what was freed: the allocator keeps it (`machine.GLIBC_TUNABLES`)."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _settle_memory() -> int:
    """Hand free pages back, reset the high-water mark; the resident bytes then."""
    hand_back()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def measure_extra_bytes(run: Callable[[], T]) -> tuple[T, int | None]:
    """Run once; its result and how far resident memory rose (None where Linux does not say)."""
    try:
        before = _settle_memory()
    except (OSError, AttributeError, Absent):
        return run(), None
    result = run()
    return result, max(0, _status_bytes("VmHWM") - before)


def timed(run: Callable[[], T]) -> Callable[[], tuple[T, float]]:
    """The same function, with the seconds it took."""

    def both() -> tuple[T, float]:
        start = time.perf_counter()
        result = run()
        return result, time.perf_counter() - start

    return both


def require_memory(n_bytes: float) -> None:
    """Raise Absent if the machine has not this much memory to give, or not within `MOST_MEMORY`."""
    try:
        text = Path("/proc/meminfo").read_text()
        held = _status_bytes("VmRSS")
    except (OSError, Absent):
        return
    total, free = (
        int(text.split(f"{name}:")[1].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable")
    )
    allowed = MOST_MEMORY * total - held
    if min(free, allowed) < n_bytes:
        raise Absent(
            f"needs {n_bytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free and "
            f"{max(allowed, 0) / 1e9:.1f} left of the {MOST_MEMORY * total / 1e9:.1f} that a run "
            "may take"
        )


# ---- running ----------------------------------------------------------------------------------


def _first_call(peer: Peer, case: Case) -> tuple[Row, float]:
    """Check the answer and measure memory; the row, and the seconds that the call took."""
    n_bytes = peer.n_bytes or case.n_bytes
    row = Row(peer.name, peer.role, "ok", n_bytes, note=peer.note, at=peer.at)
    try:
        if peer.prepare:
            peer.prepare()
        if peer.reset:
            peer.reset()
        (result, seconds), row.extra_bytes = measure_extra_bytes(timed(peer.run))
    except (Absent, ImportError, NotImplementedError, MemoryError) as error:
        row.status = f"absent: {error}"
        return row, 0.0
    except RuntimeError as error:  # torch's way to say that it cannot allocate or compile
        row.status = f"absent: {str(error).splitlines()[0]}"
        return row, 0.0
    wrong = peer.check(result) if peer.check else None
    if wrong is not None:
        row.status = f"wrong: {wrong}"
    return row, seconds


def _timed_call(peer: Peer) -> float:
    """Seconds of one call; its result is dropped outside the timing."""
    if peer.reset:
        peer.reset()
    return timed(peer.run)()[1]


def _rounds(seconds: float, case: Case, quick: bool) -> int:
    """Timed calls of a peer that takes this long."""
    fitting = int(case.peer_seconds / max(seconds, 1e-9))
    return min(3 if quick else MOST_ROUNDS, max(case.least_rounds, fitting))


def run_case(case: Case, quick: bool, say: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Check, warm up and time all peers of a case; the rows, in the order of the peers."""
    # What is there before need not be looked through for every peer: 0.1 s once models are loaded.
    gc.freeze()
    try:
        return [*case.measured, *_run_peers(case, quick, say)]
    finally:
        gc.unfreeze()


def _run_peers(case: Case, quick: bool, say: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    firsts: list[float] = []
    for peer in case.peers:
        row, seconds = _first_call(peer, case)
        say(f"{peer.name}: {row.status}, first call {seconds:.3f} s")
        rows.append(row)
        firsts.append(seconds)
    counts: list[int] = []
    for peer, row, seconds in zip(case.peers, rows, firsts, strict=True):
        if row.status != "ok":
            counts.append(0)
        elif seconds >= case.peer_seconds and case.least_rounds == 1:
            row.times_ms.append(seconds * 1e3)
            counts.append(0)
        else:  # the first call also paid for page faults and state
            if seconds < case.long:
                seconds = min(seconds, _timed_call(peer))
            counts.append(_rounds(seconds, case, quick))
    gc.collect()
    gc.disable()
    try:
        for number in range(max(counts, default=0)):
            for peer, row, count in zip(case.peers, rows, counts, strict=True):
                if number < count:
                    row.times_ms.append(_timed_call(peer) * 1e3)
    finally:
        gc.enable()
    return rows


def absent_case(op: str, error: Exception) -> Case:
    """What stands for a case whose inputs cannot be made here: one row that says why."""
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return Case(op, "", 0, 0, [], measured=[Row("all", "ours", f"absent: {why}", 0)])


# ---- what is computed from rows ---------------------------------------------------------------


def fastest(rows: Sequence[Row], role: Role) -> Row | None:
    """The quickest right row of a role, or None."""
    timed = [row for row in rows if row.role == role and row.times_ms]
    return min(timed, key=lambda row: row.p50_ms) if timed else None


def best_bandwidth(rows: Sequence[Row]) -> float | None:
    """GB/s of the best floor of the case."""
    floors = [row.gb_per_s for row in rows if row.role == "floor" and row.times_ms]
    return max(floors, default=None)


def time_ratio(above: str, below: str) -> Callable[[dict[str, Row]], float | None]:
    """Median time of one peer over that of another."""

    def measure(rows: dict[str, Row]) -> float | None:
        a, b = rows.get(above), rows.get(below)
        return a.p50_ms / b.p50_ms if a and b and a.times_ms and b.times_ms else None

    return measure


def over_floor(name: str) -> Callable[[dict[str, Row]], float | None]:
    """Median time of a peer over that of the fastest floor."""

    def measure(rows: dict[str, Row]) -> float | None:
        floor, row = fastest(list(rows.values()), "floor"), rows.get(name)
        return row.p50_ms / floor.p50_ms if floor and row and row.times_ms else None

    return measure


def under_best(names: Sequence[str], name: str) -> Callable[[dict[str, Row]], float | None]:
    """Median time of the fastest of several peers over that of `name`."""

    def measure(rows: dict[str, Row]) -> float | None:
        times = [rows[n].p50_ms for n in names if n in rows and rows[n].times_ms]
        row = rows.get(name)
        return min(times) / row.p50_ms if times and row and row.times_ms else None

    return measure


def percent_of(name: str, other: str) -> Callable[[dict[str, Row]], float | None]:
    """GB/s of one peer as percent of another's."""

    def measure(rows: dict[str, Row]) -> float | None:
        a, b = rows.get(name), rows.get(other)
        return 100 * a.gb_per_s / b.gb_per_s if a and b and a.times_ms and b.times_ms else None

    return measure


def share_of_bandwidth(name: str) -> Callable[[dict[str, Row]], float | None]:
    """Percent of the best floor's GB/s."""

    def measure(rows: dict[str, Row]) -> float | None:
        bandwidth, row = best_bandwidth(list(rows.values())), rows.get(name)
        return 100 * row.gb_per_s / bandwidth if bandwidth and row and row.times_ms else None

    return measure


def extra_share(name: str, of_bytes: int) -> Callable[[dict[str, Row]], float | None]:
    """Percent of `of_bytes` that a peer took as extra memory."""

    def measure(rows: dict[str, Row]) -> float | None:
        row = rows.get(name)
        return None if row is None or row.extra_bytes is None else 100 * row.extra_bytes / of_bytes

    return measure
