"""piece_ops: kernels for sparse in-place fine-tuning.

Choose the k parameters that matter most for a task, train only these, in place, and leave every
other weight bit for bit as it was. The ops work on plain tensors; `Importance`, `PieceModel` and
`SparseAdamW` wrap them for whole models.
"""

from __future__ import annotations

from piece_ops.delta import Delta, TaskSwitch, diff
from piece_ops.functional import (
    ChunkMaxima,
    Score,
    TopK,
    accumulate_per_sample_squares_,
    accumulate_squares_,
    gather,
    sampled_weight_grad,
    scatter_,
    select_topk,
    sparse_adamw_,
    total,
)
from piece_ops.importance import METHODS, Importance, estimate
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ChunkMaxima",
    "Delta",
    "Importance",
    "PieceModel",
    "Score",
    "Selection",
    "SparseAdamW",
    "TaskSwitch",
    "TopK",
    "__version__",
    "accumulate_per_sample_squares_",
    "accumulate_squares_",
    "diff",
    "estimate",
    "gather",
    "sampled_weight_grad",
    "scatter_",
    "select_topk",
    "sparse_adamw_",
    "total",
]
