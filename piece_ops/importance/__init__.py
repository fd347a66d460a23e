"""Which parameters matter for a task.

``estimator`` holds `Importance` and `estimate`; it uses ``candidates`` (which parameters take
part), ``passes`` (backward passes whose gradients are consumed as they arrive), ``statistics``
(what is added up; ``statistics_file`` saves it), ``sources`` and ``self_texts`` (what must be kept)
and ``scores`` (what each method ranks by).
"""

from __future__ import annotations

from piece_ops.importance.estimator import METHODS, Importance, estimate

__all__ = ["METHODS", "Importance", "estimate"]
