"""What a task changed: sparse patches of a model's weights that are kept, applied and reverted.

`Delta` is the object and its file; the modules beside it hold what its methods do.
"""

from __future__ import annotations

from piece_ops.delta.compare import diff
from piece_ops.delta.record import Delta
from piece_ops.delta.rewrite import rewrite
from piece_ops.delta.shira import from_shira, to_shira
from piece_ops.delta.switch import TaskSwitch

__all__ = ["Delta", "TaskSwitch", "diff", "from_shira", "rewrite", "to_shira"]
