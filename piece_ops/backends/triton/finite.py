"""Whether both factors of a product are finite: one read, and an answer that delays no kernel.

What         `look` leaves 1,024 numbers on the device, one not 0 if there is NaN or infinity.
             `Answer` brings them to the host; its wait ends with the look, not with kernels that
             were launched after it, which can read the same numbers and then do nothing.
Why          With torch it is four reductions and as many small kernels, and the GPU is idle until
             the host has seen their result: 0.3 to 0.4 ms of a product that takes 0.5 (H200).
Traffic      Both factors once: 134 MB for 8,192 tokens of 4096 x 4096, 0.03 ms at 4 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ops import _schema

PROGRAMS = 1024  # 7 or 8 an SM


@triton.jit  # type: ignore[untyped-decorator]
def look_kernel(  # type: ignore[no-untyped-def]
    flags,
    grad_output,
    input,
    tokens,
    out_features,
    in_features,
    grad_stride,
    input_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which of the programs, each with some tokens' rows, saw NaN or infinity."""
    bad = tl.zeros((ROWS, BLOCK), tl.int32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        is_row, rows = rows < tokens, rows.to(tl.int64)
        for start in range(0, out_features, BLOCK):
            at = start + tl.arange(0, BLOCK)[None, :]
            inside = is_row & (at < out_features)
            g = tl.load(grad_output + rows * grad_stride + at, mask=inside, other=0.0)
            bad |= (~(tl.abs(g.to(tl.float32)) < float("inf"))).to(tl.int32)
        for start in range(0, in_features, BLOCK):
            at = start + tl.arange(0, BLOCK)[None, :]
            inside = is_row & (at < in_features)
            x = tl.load(input + rows * input_stride + at, mask=inside, other=0.0)
            bad |= (~(tl.abs(x.to(tl.float32)) < float("inf"))).to(tl.int32)
    tl.store(flags + tl.program_id(0), tl.max(tl.max(bad, axis=1), axis=0))


def look(grad_output: Tensor, input: Tensor) -> Tensor:
    """Flags on the device, one not 0 if there is NaN or infinity in one of the two."""
    # Interpreted, programs run one after another, and an operation costs the same for any size.
    programs, rows, block = (PROGRAMS, 4, 512) if grad_output.is_cuda else (2, 64, 256)
    flags = torch.empty(programs, dtype=torch.int32, device=grad_output.device)
    look_kernel[(programs,)](
        flags,
        grad_output,
        input,
        len(input),
        grad_output.shape[1],
        input.shape[1],
        grad_output.stride(0),
        input.stride(0),
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
    return flags


class Answer:
    """Flags on their way to the host: ordered behind the look, not behind what comes after."""

    def __init__(self, flags: Tensor) -> None:
        self._flags, self._event = flags, None
        if flags.is_cuda:
            self._flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def raise_for(self, grad_output: Tensor, input: Tensor) -> None:
        """Wait; raise for the factor that has NaN or infinity."""
        if self._event is not None:
            self._event.synchronize()
        if not self._flags.any():
            return
        for which, factor in enumerate((grad_output, input)):
            if count := int((~factor.isfinite()).sum()):
                _schema.raise_for_nonfinite_factor(grad_output, input, which, count)
