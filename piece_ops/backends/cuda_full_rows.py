"""Rows of the weight so full of indices that a matrix product is cheaper than its entries.

What         Of sampled_weight_grad on CUDA: rows of which `SHARE` or more is wanted are multiplied
             whole by torch (tensor cores), a part at a time, and gathered; others go one by one.
Why          By prediction for an H200 the kernel of sampled_weight_grad.cu does 2.8e12 products/s
             with bfloat16 (2 bytes each at 5.5 TB/s) after 0.07 to 0.1 ms for what all indices
             share, a GEMM 4.1e14 (measured): 8192 tokens of 4096 x 4096 take equally long at 0.54 %
             of a row, of 14336 x 4096 at 0.61 %. With float32 and no tensor cores, 1.4e12 beside
             2.5e13, at 5 %. The kernel before it, which an H200 ran at 1e12, crossed at 0.25 % and
             2 %; the shares stay below the prediction until the new one has run on a GPU.
Traffic      bfloat16, a full row: 4 bytes a token of grad_output (none if all rows are full), 8 a
             column of the product in L2; input once a part.
Scratch      At most `SCRATCH_BYTES` for a part of the product and its columns of grad_output: never
             a whole large weight. A plan keeps 16 bytes an index and 8 a full row with the indices.
Bits         Sums are float32 in the order of torch's GEMM (TF32 factors if torch was told so).
Limits       Factors of one dtype. Indices without a version counter (made in inference mode) and
             indices first seen inside a graph's capture go one by one.

Emulated on a CPU; the shares were predicted, not swept, on a GPU.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

# Of a row, by bytes of an element.
SHARE = {2: 0.005, 4: 0.03}
# Positions in full rows that are worth some ten launches.
LEAST = 4096
SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class FullRows:
    """How one index tensor is split."""

    rows: Tensor | None  # None: all rows of the weight
    places: Tensor  # of every index in them, in [full rows, columns]
    slots: Tensor | None  # where its value goes; None: they are all the indices
    begins: Tensor  # on the CPU: which of `places` begins each full row, and their number
    rest: Tensor  # the other indices
    rest_slots: Tensor


_plans: dict[tuple[int, int], tuple[weakref.ref[Tensor], object, FullRows | None]] = {}


def split(indices: Tensor, shape: tuple[int, int], share: float) -> FullRows | None:
    """Split checked indices of a weight [out, in]; None where too few lie in full rows."""
    out, width = shape
    if indices.numel() < LEAST:
        return None
    rows, row, count = torch.unique_consecutive(
        indices // width, return_inverse=True, return_counts=True
    )
    is_full = count >= max(1.0, share * width)
    counts = count[is_full].cpu()
    if int(counts.sum()) < LEAST:
        return None
    of_full = is_full[row]
    slots, rest_slots = (x.nonzero().view(-1) for x in (of_full, ~of_full))
    rank = is_full.cumsum(0) - 1
    places = rank[row[slots]] * width + indices[slots] % width
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return FullRows(
        None if len(counts) == out else rows[is_full],
        places,
        slots if len(rest_slots) else None,
        begins,
        indices[rest_slots],
        rest_slots,
    )


def plan(indices: Tensor, shape: tuple[int, int], size: int, capturing: bool) -> FullRows | None:
    """The plan kept with these indices while nobody writes them; the first time waits."""
    if indices.is_inference():
        return None
    key = id(indices), size
    state = indices.data_ptr(), indices._version, shape, SHARE[size], LEAST
    known = _plans.get(key)
    if known is not None and known[0]() is indices and known[1] == state:
        return known[2]
    if capturing:
        return None
    made = split(indices, shape, SHARE[size])
    _plans[key] = weakref.ref(indices, lambda _: _plans.pop(key, None)), state, made
    return made


def fill(values: Tensor, grad_output: Tensor, input: Tensor, full: FullRows) -> None:
    """Write the values of all indices in full rows."""
    tokens, width = input.shape
    row_bytes = 4 * width + (0 if full.rows is None else tokens * input.element_size())
    step = max(1, SCRATCH_BYTES // row_bytes)
    count = len(full.begins) - 1
    for first in range(0, count, step):
        end = min(first + step, count)
        begin, stop = full.begins[first].item(), full.begins[end].item()
        if full.rows is None:
            part = grad_output[:, first:end]
        else:
            part = grad_output.index_select(1, full.rows[first:end])
        whole = _product(part, input).view(-1)
        found = whole.index_select(0, full.places[begin:stop] - first * width)
        if full.slots is None:
            values[begin:stop] = found
        else:
            values.index_copy_(0, full.slots[begin:stop], found)


def _product(grad_output: Tensor, input: Tensor) -> Tensor:
    """grad_output^T input in float32."""
    if grad_output.is_cuda and grad_output.dtype != torch.float32:
        return torch.mm(grad_output.t(), input, out_dtype=torch.float32)
    return torch.mm(grad_output.float().t(), input.float())
