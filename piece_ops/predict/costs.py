"""The byte model: what each op moves and computes, as the header of its kernel says.

One function an op, used for both backends. They differ in what a scattered access moves
(`Device.line`: a sector of 32 bytes on a GPU, a cache line of 64 on a CPU) and where noted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from piece_ops.backends.cuda import SAMPLED_SCRATCH_BYTES
from piece_ops.backends.cuda_full_rows import SHARE as FULL_SHARE
from piece_ops.predict.devices import Device

# Python and launches: `SparseAdamW` takes 0.5 ms for 254 tensors. It is added on a CPU; a GPU works
# meanwhile, so there it is a lower bound.
HOST_SECONDS_A_TENSOR = 2e-6
# csrc/cuda/select_topk.cu: the ten small kernels beside the one that reads, predicted.
SELECT_LAUNCHES = 1.3e-4
# csrc/cuda/sampled_weight_grad.cu: three launches for as many tokens as the scratch holds.
SAMPLED_STEP = 7.5e-6
# backends/triton/accumulate_per_sample_squares.py: the host waits for the look at G and X.
SQUARES_WAIT = 2e-5


@dataclass(frozen=True)
class Work:
    """Bytes that are `read`, `moved` (read and written) or come from `l2`; operations in matrix
    `products` and in per-sample `squares`; seconds of waiting; tensors that the host handles."""

    read: float = 0.0
    moved: float = 0.0
    l2: float = 0.0
    products: float = 0.0
    squares: float = 0.0
    wait: float = 0.0
    tensors: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: part + getattr(other, name) for name, part in vars(self).items()})

    def __mul__(self, times: float) -> Work:
        return Work(**{name: times * part for name, part in vars(self).items()})

    __rmul__ = __mul__

    def seconds(self, on: Device) -> float:
        """Time on a device: each part at its own rate, one after another."""
        busy = self.read / on.read + self.moved / on.moved + self.l2 / on.l2 + self.wait
        busy += self.products / on.products + self.squares / on.squares
        host = self.tensors * HOST_SECONDS_A_TENSOR
        return max(busy, host) if is_gpu(on) else busy + host


def is_gpu(on: Device) -> bool:
    """Whether the device has a host beside it that launches its kernels."""
    return on.line == 32


# ---- ops ----------------------------------------------------------------------------------------


def accumulate_squares(n: float, size: int, accumulators: int, tensors: int = 1) -> Work:
    """csrc/*/accumulate_squares.*: look at gradients of `size` bytes; read, add, write."""
    return Work(read=size * n, moved=(size + 8 * accumulators) * n, tensors=tensors)


def accumulate_per_sample_squares(
    tokens: float, out: int, width: int, size: int, accumulators: int, on: Device
) -> Work:
    """The batch's weight gradient in flops; accumulators once; a look at both factors."""
    return Work(
        read=tokens * (out + width) * size,
        moved=8 * accumulators * out * width,
        squares=2 * tokens * out * width,
        wait=SQUARES_WAIT if is_gpu(on) else 0.0,
        tensors=1,
    )


def select_topk(n: float, k: float, inputs_size: int, on: Device, tensors: int = 1) -> Work:
    """csrc/*/select_topk.*: one read of `inputs_size` bytes a score, and a sample of it."""
    if is_gpu(on):
        return Work(read=n * inputs_size * 4.10 / 4, wait=SELECT_LAUNCHES, tensors=tensors)
    return Work(read=n * inputs_size * 1.004 + 24 * k, tensors=tensors)


def select_topk_scratch(n: float, k: float, on: Device) -> float:
    """Bytes of scratch and result."""
    if is_gpu(on):
        return 6 * min(n, 2 * k + n / 128 + 4096) + 40 * n / 4096 + 8 * k
    return 8 * 1.8 * k + 40 * n / 65536 + 8 * k


def sampled_weight_grad(
    tokens: float, out: int, width: int, size: int, k: float, on: Device
) -> Work:
    """csrc/*/sampled_weight_grad.*; used columns as if the k positions were random."""
    density = k / (out * width)
    if is_gpu(on) and density >= FULL_SHARE[size]:  # of evenly spread positions: all rows are full
        whole = 2 * tokens * out * width
        return Work(
            moved=tokens * (out + width) * size + 8 * out * width, products=whole, tensors=1
        )
    if is_gpu(on):
        # The input's panel is written to L2, of which every index reads a row.
        block = 256 * size * width + 4 * k
        steps = math.ceil(tokens / 256 / max(1, SAMPLED_SCRATCH_BYTES // block))
        return Work(
            read=tokens * (out + width) * size,
            l2=tokens * (width + k) * size,
            wait=steps * SAMPLED_STEP,
            tensors=1,
        )
    used = out * (1 - (1 - density) ** width) + width * (1 - (1 - density) ** out)
    # Transposed elements go to L2 as float32 and come back; that bounds it.
    return Work(moved=8 * tokens * used, tensors=1)


def sparse_adamw(k: float, on: Device, tensors: int = 1, has_dense_grads: bool = False) -> Work:
    """csrc/*/sparse_adamw.*: index, gradient, master, moments; a line of the weight twice."""
    # A dense gradient is a line instead of 4 bytes.
    grad = on.line if has_dense_grads else 4
    return Work(moved=(8 + grad + 24 + 2 * on.line) * k, tensors=tensors)


def gather(k: float, size: int, on: Device, tensors: int = 1) -> Work:
    """csrc/*/gather.*: index, a line of the source, value."""
    return Work(read=(8 + on.line + size) * k, tensors=tensors)


def scatter(k: float, size: int, on: Device, tensors: int = 1) -> Work:
    """csrc/*/scatter.*: index, value, a line of the target read and written."""
    return Work(moved=(8 + size + 2 * on.line) * k, tensors=tensors)


def total(n: float, size: int, tensors: int = 1) -> Work:
    """csrc/*/total.*: one read."""
    return Work(read=size * n, tensors=tensors)


# ---- dense masking, in plain PyTorch ------------------------------------------------------------


def masked_adamw(n: float, size: int) -> Work:
    """Gradient times mask (3 accesses a weight), torch.optim.AdamW, fused (7), all of `size`."""
    return Work(moved=10 * size * n)


def dense_squares(n: float, size: int, accumulators: int) -> Work:
    """A sample's dense gradient written, then read and added to float32 accumulators."""
    return Work(moved=(2 * size + 8 * accumulators) * n)


def dense_selection(n: float, inputs_size: int, size: int) -> Work:
    """All scores written into one array; one read of it (torch.topk takes more); a mask."""
    return Work(read=(inputs_size + 4) * n, moved=(4 + size) * n)
