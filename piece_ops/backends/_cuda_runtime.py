"""What every CUDA op needs: the extension's CUDA half, a place to run, tables, checked indices.

A *table* holds what a kernel over many tensors reads: addresses, sizes, tiles. It is made by the
extension, written into device memory from torch's allocator, and kept here for the next call with
the same addresses and sizes. It travels as kernel arguments, so writing it waits for nothing.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from piece_ops._native import extension

# Tables kept, over all ops, devices and streams, in bytes of device memory. One of Llama-8B's 291
# tensors has 21 KB, one of 10,000 tensors up to 1.1 MB.
KEPT_BYTES = 32 << 20


class Runtime:
    """What is asked of torch.cuda. The tests put emulated kernels on the CPU in its place."""

    def __init__(self) -> None:
        self._fitting: set[int] = set()

    def module(self, op: str) -> ModuleType:
        """Return the extension, if it was built with CUDA."""
        module = extension()
        if not module.cuda_architectures:
            raise NotImplementedError(
                f"piece_ops.{op}: the tensors are on a CUDA device, but this build of piece_ops "
                "has kernels for the CPU only; build it where nvcc is found (PIECE_OPS_CUDA=ON "
                "pip install .), or move the tensors with .cpu()"
            )
        return module

    def takes(self, tensor: Tensor) -> bool:
        """Tell whether the CUDA backend is the one for this tensor."""
        return tensor.is_cuda

    def index(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def require(self, module: ModuleType, index: int) -> None:
        """Raise, saying what is missing, unless this build has code for the device."""
        if index not in self._fitting:
            module.cuda_require_device(index)
            self._fitting.add(index)

    def on(self, index: int) -> AbstractContextManager[Any]:
        if index == torch.cuda.current_device():
            return _ALREADY_THERE  # switching costs 2 us
        return torch.cuda.device(index)

    def stream(self, index: int) -> int:
        return int(torch._C._cuda_getCurrentRawStream(index))  # a tenth of current_stream's cost

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())


_ALREADY_THERE: AbstractContextManager[Any] = nullcontext()
runtime = Runtime()


def use(replacement: Runtime) -> Runtime:
    """Put another runtime in place (tests); returns the one before."""
    global runtime
    before, runtime = runtime, replacement
    return before


@dataclass
class Place:
    """Where one call runs. Used as ``with place.guard:``."""

    op: str
    module: ModuleType
    device: torch.device
    index: int
    guard: AbstractContextManager[Any]

    @property
    def where(self) -> tuple[int, int]:
        """Device index and current stream, as every CUDA function of the extension takes them."""
        return self.index, runtime.stream(self.index)

    @property
    def capturing(self) -> bool:
        """Is the current stream being captured into a graph?"""
        return runtime.is_capturing()

    def read(self, words: Tensor) -> list[int]:
        """Wait for the current stream; what these int64 on the device are."""
        numbers: list[int] = self.module.cuda_read_words(
            words.data_ptr(), words.numel(), *self.where
        )
        return numbers


def place_of(op: str, tensor: Tensor) -> Place:
    """Find the tensor's device; its current stream is asked for when needed."""
    module = runtime.module(op)
    index = runtime.index(tensor.device)
    runtime.require(module, index)
    return Place(op, module, tensor.device, index, runtime.on(index))


_version_of = operator.attrgetter("_version")


# ---- tables --------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table on the host (``handle``) and on the device (``words``)."""

    handle: Any
    words: Tensor
    # The index tensors that were found right for it last, and their versions.
    checked: tuple[list[weakref.ref[Tensor]], list[int]] | None = None
    look: Any = None  # of the lists it was made for, if it is kept by that
    plans: dict[Any, Any] = field(default_factory=dict)  # what an op has laid out over it

    @property
    def pair(self) -> tuple[Any, int]:
        """The first two arguments of every CUDA function that reads a table."""
        return self.handle, self.words.data_ptr()

    def remember(self, indices: Sequence[Tensor]) -> None:
        """These were found right; ones without version counters are checked at every call."""
        if not any(map(Tensor.is_inference, indices)):
            self.checked = list(map(weakref.ref, indices)), list(map(_version_of, indices))

    def has_checked(self, indices: Sequence[Tensor]) -> bool:
        """Are these the ones remembered, not written since? (A table has fixed addresses.)"""
        if self.checked is None:
            return False
        references, versions = self.checked
        # A living tensor has one reference without callback.
        same = all(map(operator.is_, references, map(weakref.ref, indices)))
        return same and versions == list(map(_version_of, indices))


class Tables:
    """The tables used last, as many as fit into `KEPT_BYTES`; the newest in any case.

    Behind a lock: autograd calls from one thread for each device.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: OrderedDict[Any, Table] = OrderedDict()
        self.n_bytes = 0

    def get(self, key: Any) -> Table | None:
        with self._lock:
            if key not in self._tables:
                return None
            self._tables.move_to_end(key)
            return self._tables[key]

    def put(self, key: Any, table: Table) -> Table:
        """Keep a table; the one that is kept, if another thread was first."""
        with self._lock:
            kept = self._tables.setdefault(key, table)
            if kept is table:
                self.n_bytes += table.handle.n_bytes
            while self.n_bytes > KEPT_BYTES and len(self._tables) > 1:
                _, oldest = self._tables.popitem(last=False)
                self.n_bytes -= oldest.handle.n_bytes
            return kept

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()
            self.n_bytes = 0


_tables = Tables()


def forget_tables() -> None:
    """Free the device memory of all tables that are kept."""
    _tables.clear()


def table_of(
    place: Place, make: Callable[..., Any], *columns: Sequence[int], key: Any = None
) -> Table:
    """Get the table of these columns: the one kept, or a new one.

    Keyed by stream, because it was written on that one. Under capture nothing is kept or taken:
    the graph writes its own copy again at every replay, in memory of its own. `key` (of a `Recall`)
    stands for the columns.
    """
    capturing = place.capturing
    index, stream = place.where
    key = key or (place.op, index, stream, tuple(map(tuple, columns)))
    known = None if capturing else _tables.get(key)
    if known is not None:
        return known
    handle = make(*columns)
    words = torch.empty(handle.n_bytes // 8, dtype=torch.int64, device=place.device)
    handle.write(words.data_ptr(), index, stream)
    table = Table(handle, words)
    return table if capturing else _tables.put(key, table)


# ---- lists that come again -----------------------------------------------------------------------

# torch's C functions that tell what a tensor is; they came with torch 2.10. Without them every call
# is checked in Python.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)


class Recall:
    """Lists of tensors, looked at in one pass: is there a table of such, checked when it was made?

    Equal looks have equal addresses, sizes, dtypes, dimensions, layouts and devices: all that the
    checks of an op depend on (not the values of indices). `more` is what else the table depends on.

    Attributes
    ----------
    key : object
        For `table_of`; None where nothing can be recalled.
    table : Table or None
        The one that is kept.
    """

    def __init__(self, place: Place, lists: tuple[Sequence[Tensor], ...], more: Any = ()) -> None:
        self._lists = lists
        self.key: Any = None
        self.table: Table | None = None
        if _EXCHANGE is None or place.capturing:
            return
        self._look = place.module.cuda_look(_EXCHANGE, lists)
        if self._look is not None:
            self.key = (place.op, *place.where, more, self._look)
            self.table = _tables.get(self.key)

    @property
    def knows_each(self) -> bool:
        """Are these the very tensors that came through the dispatcher when the table was made?"""
        table = self.table
        return table is not None and table.look is not None and table.look.knows(self._lists)

    def remember(self) -> None:
        """Of the table just made: these came through the dispatcher, so they are plain tensors."""
        if self.key is None or any(map(Tensor.is_inference, chain(*self._lists))):
            return
        table = _tables.get(self.key)
        if table is not None:
            self._look.remember(self._lists)
            table.look = self._look
            if len(_first_ids) > 1000:
                _first_ids.clear()
            _first_ids.add(id(next(chain(*self._lists))))


# Of the first tensors of lists that are remembered. An old one, which another object may have by
# now, costs a look in vain.
_first_ids: set[int] = set()


def may_know(first: Tensor) -> bool:
    """Might lists that begin with this tensor go straight to this backend?

    If no mode, trace or profile wants to see the call, and if `Recall` knows each tensor, nothing
    can happen to them in the dispatcher, which costs 0.07 to 0.1 us a tensor.
    """
    if torch.compiler.is_compiling() or id(first) not in _first_ids:
        return False
    if not runtime.takes(first):  # another object by now, at a dead one's id
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    )


# ---- indices -------------------------------------------------------------------------------------

# Index tensors found right, by id: a weak reference, address, version counter and the number that
# all positions are below. A tensor that torch has written since has another version.
_checked: dict[int, tuple[weakref.ref[Tensor], int, int, int]] = {}


def is_checked(index: Tensor, bound: int) -> bool:
    """Tell whether this tensor was found right for this bound and not written since."""
    known = _checked.get(id(index))
    return (
        known is not None
        and known[0]() is index
        and known[1:] == (index.data_ptr(), index._version, bound)
    )


def _remember(index: Tensor, bound: int) -> None:
    if index.is_inference():  # has no version counter: checked at every call
        return
    key = id(index)
    reference = weakref.ref(index, lambda _: _checked.pop(key, None))
    _checked[key] = (reference, index.data_ptr(), index._version, bound)


def check_indices(
    place: Place, table: Table, indices: Sequence[Tensor], bounds: Sequence[int]
) -> None:
    """Raise unless all positions increase and lie inside their tensors.

    One read of the indices and one wait for the device, the first time that these tensors are
    seen; afterwards nothing but a look at their version counters.
    """
    if table.has_checked(indices):
        return
    fresh = [
        (index, bound)
        for index, bound in zip(indices, bounds, strict=True)
        if index.numel() and (index.is_inference() or not is_checked(index, bound))
    ]
    if not fresh:
        table.remember(indices)
        return
    if place.capturing:
        raise RuntimeError(
            f"piece_ops.{place.op}: indices must be checked before a CUDA graph is captured, since "
            "that waits for the device; call the op once with the same index tensors first"
        )
    report = torch.empty(1, dtype=torch.int64, device=place.device)
    place.module.cuda_check_indices(*table.pair, report.data_ptr(), *place.where)
    t, slot = table.handle.locate(report.item())
    if t < 0:
        for index, bound in fresh:
            _remember(index, bound)
        table.remember(indices)
        return
    i, n = int(indices[t][slot]), bounds[t]
    where = f"piece_ops.{place.op}: indices[{t}] must be"
    if not 0 <= i < n:
        raise ValueError(f"{where} in 0..{n - 1}, got {i} at slot {slot}")
    previous = int(indices[t][slot - 1])
    raise ValueError(f"{where} strictly increasing, got {i} after {previous} at slot {slot}")
