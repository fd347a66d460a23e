"""torch.library: the schema, the argument checker and the fake kernel of every op, a file each.

``torch.ops.piece_ops.*`` work under ``torch.compile(fullgraph=True)``. A checker is written once
and used by the fake kernel and by every backend. Mutated arguments are declared in the schema;
the version counters are bumped by the backends (nobody else does it for ops defined like this).
No gradient flows through any op.
"""

import torch

from piece_ops._schema.accumulate_per_sample_squares import (
    check_accumulate_per_sample_squares_,
    check_offsets,
    raise_for_nonfinite_factor,
)
from piece_ops._schema.accumulate_squares import check_accumulate_squares_, check_weight
from piece_ops._schema.checks import (
    DTYPE_CODES,
    FLOATS,
    HALVES_AND_FLOAT,
    bump_versions,
    check_name,
    check_same_count,
    check_same_device,
    check_same_numel,
    check_tensors,
    dtype_of,
)
from piece_ops._schema.gather import check_gather, new_values
from piece_ops._schema.library import LIBRARY, register
from piece_ops._schema.sampled_weight_grad import check_sampled_weight_grad
from piece_ops._schema.scatter import check_scatter_
from piece_ops._schema.select_topk import (
    ALGORITHM_CODES,
    SCORE_CODES,
    SCORES_WITH_SECOND,
    check_k,
    check_select_topk,
)
from piece_ops._schema.sparse_adamw import check_adamw_numbers, check_sparse_adamw_
from piece_ops._schema.total import check_total

OPS = (
    "accumulate_squares_",
    "accumulate_per_sample_squares_",
    "select_topk",
    "sparse_adamw_",
    "gather",
    "scatter_",
    "total",
    "sampled_weight_grad",
)

for _op in OPS:
    # No gradient flows: results never require grad, whatever the inputs do.
    LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")

__all__ = [
    "ALGORITHM_CODES",
    "DTYPE_CODES",
    "FLOATS",
    "HALVES_AND_FLOAT",
    "LIBRARY",
    "OPS",
    "SCORES_WITH_SECOND",
    "SCORE_CODES",
    "bump_versions",
    "check_accumulate_per_sample_squares_",
    "check_accumulate_squares_",
    "check_adamw_numbers",
    "check_gather",
    "check_k",
    "check_name",
    "check_offsets",
    "check_same_count",
    "check_same_device",
    "check_same_numel",
    "check_sampled_weight_grad",
    "check_scatter_",
    "check_select_topk",
    "check_sparse_adamw_",
    "check_tensors",
    "check_total",
    "check_weight",
    "dtype_of",
    "new_values",
    "raise_for_nonfinite_factor",
    "register",
]
