"""bfloat16 accumulators: what is added is rounded at random, by a counter, not by a state.

A float32 sum x lies between two bfloat16 numbers; adding a 16-bit random number to its bits and
cutting off the lower half takes the upper one with the probability of x's share of the distance.
The mean of many sums is then right, where rounding to nearest stops adding numbers 2^-9 times
smaller than the sum. The random number is a hash of (seed, accumulator, sample, position).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from piece_ops.backends import cpu
from piece_ops.importance.candidates import Rows
from piece_ops.importance.on_device import OnDevice
from piece_ops.importance.rules import Target

_PART = 1 << 17  # elements at a time: temporaries of 1 MB stay in the cache
_MASK = 0xFFFFFFFF


class RoundedTarget(Target):
    """Adds a batch (or sample) in float32, one parameter at a time, then into bfloat16."""

    def __init__(
        self,
        square_sums: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        first: int,
        is_reference: bool = False,
        on_device: OnDevice | None = None,
        rows: Mapping[str, Rows] | None = None,
        *,
        seed: int,
    ) -> None:
        super().__init__(square_sums, sums, first, is_reference, on_device, rows)
        self._seed = seed
        self._open: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def open(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """float32 zeros, of the accumulators that are wanted."""
        if name not in self._open:
            squares, sums = super().open(name)
            self._open[name] = _zeros_for(squares), _zeros_for(sums)
        return self._open[name]

    def close(self, name: str) -> None:
        """Add what has come together."""
        kinds = ("reference" if self.is_reference else "square_sums", "sums")
        for kind, stored, value in zip(
            kinds, super().open(name), self._open.pop(name), strict=True
        ):
            if stored is not None and value is not None:
                key = _mix_number(self._seed ^ zlib.crc32(f"{kind}/{name}".encode()))
                begin = self.rows[name][0] * stored[0].numel() if name in self.rows else 0
                key = _mix_number(key ^ self.sample)
                super().note(name, add_rounded_(stored, value, key=key, begin=begin))

    def note(self, name: str, overflowed: bool | None) -> None:
        """Nothing: what overflows float32 is seen when it is rounded."""


def _zeros_for(stored: Tensor | None) -> Tensor | None:
    return None if stored is None else torch.zeros_like(stored, dtype=torch.float32)


def add_rounded_(target: Tensor, value: Tensor, *, key: int, begin: int = 0) -> bool | None:
    """``target += value`` in float32, rounded to bfloat16 at random; both contiguous.

    `begin`: the position of the first of them in the accumulator, if they are only a part of it.
    Whether a sum is not finite afterwards; None: nobody looked.
    """
    if target.device.type == "cpu":
        return cpu.add_rounded_(target, value, key, begin)
    _add_rounded_in_torch(target, value, key, begin)
    return None


def _add_rounded_in_torch(target: Tensor, value: Tensor, key: int, begin: int) -> None:
    """For other devices; on the CPU it has the kernel's bits."""
    stored, added = target.view(-1), value.view(-1)
    first, end = begin, begin + stored.numel()
    while first < end:
        after = min(end, (first // _PART + 1) * _PART)
        part = stored[first - begin : after - begin]
        exact = part.float().add_(added[first - begin : after - begin])
        places = torch.arange(first, after, device=part.device)
        random = _mix(places ^ key ^ _mix_number(first >> 32)) & 0xFFFF
        # Of a negative number the bits grow with its size: this rounds both signs alike.
        bits = exact.view(torch.int32).add_(random.int()).bitwise_and_(-65536)
        part.copy_(bits.view(torch.float32))
        first = after


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash (lowbias32) of the lower halves of int64 numbers."""
    x = x & _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _mix_number(number: int) -> int:
    x = number & _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
