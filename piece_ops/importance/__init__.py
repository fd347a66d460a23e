"""Which parameters matter for a task.

``estimator`` holds `Importance`; ``one_call`` holds `estimate`, with ``budget`` for little memory.
They use ``candidates`` (which parameters take part), ``statistics`` (what is added up;
``statistics_file`` saves it, ``rounding`` halves it), ``sources`` and ``self_texts`` (what must be
kept) and ``scores`` (what each method ranks by).

Gradients come from ``passes`` (one sample at a time, consumed as they arrive) or from one backward
of a whole batch: ``batches`` (what the samples are), ``trial`` (what two of them, run together and
alone, say about ``layouts`` and ``conventions``), ``batched`` (what that covers), ``batched_pass``
with ``taps`` (what modules compute from) and ``rules`` (per-sample gradients from that).
"""

from __future__ import annotations

from piece_ops.importance.estimator import METHODS, Importance
from piece_ops.importance.one_call import estimate

__all__ = ["METHODS", "Importance", "estimate"]
