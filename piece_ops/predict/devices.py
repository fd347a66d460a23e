"""What a device can do: datasheet numbers of GPUs, and this CPU as a short test finds it.

What kernels reach of a datasheet is assumed as in the headers of csrc/cuda and backends/triton, for
every GPU alike: on an H200 4.3 of 4.8 TB/s read, 4.0 read and write, 650 of 989 TFLOP/s in matrix
products, 600 in the per-sample kernel, 5.5 TB/s from L2. What an H200 reached is in
``bench/results/cuda.jsonl``: long calls between all and half of
what this predicts, calls below a millisecond less, for the host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from piece_ops import _native

READ, MOVED, PRODUCTS, SQUARES, L2 = 4.3 / 4.8, 4.0 / 4.8, 650 / 989, 600 / 989, 5.5 / 4.8
GB = 1e9


@dataclass(frozen=True)
class Device:
    """Rates in bytes or operations a second, sizes in bytes.

    `read`: kernels that only read memory; `moved`: that read and write; `l2`: from the cache;
    `products`: matrix products; `squares`: the per-sample kernel; `link`: to other devices, each
    way (0: none). `line`: what one scattered access moves. `source`: where the rates come from.
    """

    name: str
    memory: float
    read: float
    moved: float
    l2: float
    products: float
    squares: float
    link: float
    line: int
    source: str


# Datasheets of NVIDIA, dense, without sparsity: memory GB, GB/s, TFLOP/s of bfloat16 (float16 the
# same) in tensor cores and of float32 outside them (torch's default, not TF32), GB/s of NVLink or
# PCIe each way.
DATASHEETS = {
    "h200": (141, 4800, 989, 67, 450),  # H200 SXM
    "h100": (80, 3350, 989, 67, 450),  # H100 SXM5
    "b200": (180, 8000, 2250, 80, 900),  # B200 in an HGX of 1000 W
    "a100": (80, 2039, 312, 19.5, 300),  # A100 80 GB SXM4
    "rtx4090": (24, 1008, 165.2, 82.6, 32),  # float32 accumulation; PCIe 4.0 x16
}
NAMES = (*DATASHEETS, "cpu")


def device(name: str, dtype: torch.dtype, bandwidth: float | None = None) -> Device:
    """Return a device by name.

    Parameters
    ----------
    name : str
        One of `NAMES`; "cpu" is measured, which takes about a second.
    dtype : torch.dtype
        That of the matrix products.
    bandwidth : float, optional
        A measured one in GB/s, taken as it is in place of the share of the datasheet's.

    Raises
    ------
    ValueError
        For an unknown name or a bandwidth that is not positive.

    Examples
    --------
    >>> device("h200", torch.bfloat16).read / 1e12
    4.3
    """
    where = "piece_ops.predict.device"
    if name not in NAMES:
        raise ValueError(f"{where}: name must be one of {', '.join(NAMES)}, got {name!r}")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"{where}: bandwidth must be positive, got {bandwidth}")
    found = _cpu(dtype) if name == "cpu" else _gpu(name, dtype)
    if bandwidth is None:
        return found
    rate, source = bandwidth * GB, f"{bandwidth:g} GB/s as given"
    return replace(found, read=rate, moved=rate, source=source)


def _gpu(name: str, dtype: torch.dtype) -> Device:
    memory, bandwidth, half, single, link = DATASHEETS[name]
    flops = (single if dtype == torch.float32 else half) * 1e12
    return Device(
        name=name.upper(),
        memory=memory * GB,
        read=bandwidth * GB * READ,
        moved=bandwidth * GB * MOVED,
        l2=bandwidth * GB * L2,
        products=flops * PRODUCTS,
        squares=flops * SQUARES,
        link=link * GB,
        line=32,
        source=f"datasheet ({bandwidth:,} GB/s, {flops / 1e12:g} TFLOP/s), "
        f"of which {100 * READ:.0f} % read, {100 * MOVED:.0f} % read and write, "
        f"{100 * PRODUCTS:.0f} % in products",
    )


def _cpu(dtype: torch.dtype) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    data = torch.ones(2**26)  # 256 MiB: no cache holds it
    read = data.nbytes / _fastest(lambda: _native.read_bandwidth_probe(data))
    a = torch.ones(1024, 1024, dtype=dtype)
    products = 2 * 1024**3 / _fastest(lambda: a @ a)
    return cpu(memory, read, products, f"{read / GB:.0f} GB/s read and products measured now")


def cpu(memory: float, read: float, products: float, source: str) -> Device:
    """A CPU of these rates: one bandwidth for all, 64-byte lines."""
    return Device("CPU", memory, read, read, read, products, products, 0.0, 64, source)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls, after one to warm up."""
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
