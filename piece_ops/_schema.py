"""torch.library: the schema, the argument checker and the fake kernel of every op.

``torch.ops.piece_ops.*`` work under ``torch.compile(fullgraph=True)``. A checker is written once
and used by the fake kernel and by every backend. Mutated arguments are declared in the schema;
the version counters are bumped by the backends (nobody else does it for ops defined like this).
No gradient flows through any op.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

LIBRARY: Any = torch.library.Library("piece_ops", "DEF")  # type: ignore[no-untyped-call]

HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*HALVES_AND_FLOAT, torch.float64)
# The numbers of csrc/include/piece_ops: core/dtype.h, math/score.h, ops/select_topk.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
SCORE_CODES = {
    "plain": 0,
    "piece-s": 1,
    "piece-g": 2,
    "magnitude": 3,
    "snip": 4,
    "taylor": 5,
    "random": 6,
}
SCORES_WITH_SECOND = ("piece-s", "piece-g", "snip", "taylor")
ALGORITHM_CODES = {"auto": 0, "filter": 1, "radix": 2}
NAN_RULES = ("raise", "lowest")

dtype_of = attrgetter("dtype")
_device_of = attrgetter("device")
_is_cuda = attrgetter("is_cuda")


_Function = TypeVar("_Function", bound=Callable[..., Any])


def register_fake(op: str) -> Callable[[_Function], _Function]:
    """Decorator: what an op returns, from shapes and dtypes alone."""

    def decorate(function: _Function) -> _Function:
        torch.library.register_fake(f"piece_ops::{op}", function, lib=LIBRARY)
        return function

    return decorate


def register(op: str, device: str) -> Callable[[_Function], _Function]:
    """Decorator: the implementation of an op on a device ("CPU", "CUDA")."""

    def decorate(function: _Function) -> _Function:
        LIBRARY.impl(op, function, device)
        return function

    return decorate


def _name_dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensors(
    op: str, argument: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> set[torch.dtype]:
    """Check dtype and contiguity of one list; its dtypes. The right case costs 0.1 us a tensor."""
    found = set(map(dtype_of, tensors))
    if not found <= set(dtypes):
        for t, tensor in enumerate(tensors):
            if tensor.dtype not in dtypes:
                raise TypeError(
                    f"piece_ops.{op}: {argument}[{t}] must be {_name_dtypes(dtypes)}, "
                    f"got {_name_dtypes([tensor.dtype])}"
                )
    if not all(map(Tensor.is_contiguous, tensors)):
        t = next(t for t, tensor in enumerate(tensors) if not tensor.is_contiguous())
        raise ValueError(
            f"piece_ops.{op}: {argument}[{t}] must be contiguous, got shape "
            f"{tuple(tensors[t].shape)} with strides {tensors[t].stride()}; "
            "call .contiguous() first if a copy is meant"
        )
    return found


def check_same_count(op: str, count: int, **lists: Sequence[Any]) -> None:
    """Check that every list has ``count`` entries."""
    for argument, tensors in lists.items():
        if len(tensors) != count:
            raise ValueError(
                f"piece_ops.{op}: {argument} must have {count} tensors, got {len(tensors)}"
            )


def check_same_numel(
    op: str, argument: str, tensors: Sequence[Tensor], like: str, others: Sequence[Tensor]
) -> None:
    """Check that tensors have pairwise as many elements as others."""
    if list(map(Tensor.numel, tensors)) == list(map(Tensor.numel, others)):
        return
    for t, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        if tensor.numel() != other.numel():
            raise ValueError(
                f"piece_ops.{op}: {argument}[{t}] must have {other.numel()} elements like "
                f"{like}[{t}], got {tensor.numel()} (shape {tuple(tensor.shape)})"
            )


def check_same_device(op: str, *lists: Sequence[Tensor]) -> None:
    """Check that all tensors of all lists are on one device."""
    every = list(chain.from_iterable(lists))
    if all(map(_is_cuda, every)) and len(set(map(Tensor.get_device, every))) <= 1:
        return  # without an object for each device: at half the cost
    devices = set(map(_device_of, every))
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"piece_ops.{op}: all tensors must be on one device, got {names}")


def _check_indices(op: str, indices: Sequence[Tensor], argument: str = "indices") -> None:
    check_tensors(op, argument, indices, (torch.int64,))
    if set(map(Tensor.dim, indices)) <= {1}:
        return
    for t, index in enumerate(indices):
        if index.dim() != 1:
            raise ValueError(
                f"piece_ops.{op}: {argument}[{t}] must be flat (1-D), got shape "
                f"{tuple(index.shape)}"
            )


def check_name(op: str, argument: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(
            f"piece_ops.{op}: {argument} must be one of {', '.join(known)}, got {value!r}"
        )


# ---- accumulate_squares_ -------------------------------------------------------------------------

LIBRARY.define(
    "accumulate_squares_(Tensor(a!)[] square_sums, Tensor[] grads, Tensor(b!)[] sums, "
    "float weight) -> ()"
)


def check_accumulate_squares_(
    square_sums: Sequence[Tensor], grads: Sequence[Tensor], sums: Sequence[Tensor], weight: float
) -> None:
    """square_sums or sums may be empty lists: left out."""
    op = "accumulate_squares_"
    if not square_sums and not sums and grads:
        raise ValueError(f"piece_ops.{op}: square_sums or sums must be given, got neither")
    check_tensors(op, "grads", grads, HALVES_AND_FLOAT)
    for argument, accumulators in (("square_sums", square_sums), ("sums", sums)):
        if accumulators:
            check_same_count(op, len(grads), **{argument: accumulators})
            check_tensors(op, argument, accumulators, (torch.float32,))
            check_same_numel(op, argument, accumulators, "grads", grads)
    check_same_device(op, square_sums, grads, sums)
    check_weight(weight)


def check_weight(weight: float) -> None:
    """Of accumulate_squares_."""
    op = "accumulate_squares_"
    if not 0 < weight < float("inf"):
        raise ValueError(f"piece_ops.{op}: weight must be positive and finite, got {weight}")


@register_fake("accumulate_squares_")
def _fake_accumulate_squares_(
    square_sums: list[Tensor], grads: list[Tensor], sums: list[Tensor], weight: float
) -> None:
    check_accumulate_squares_(square_sums, grads, sums, weight)


# ---- accumulate_per_sample_squares_ --------------------------------------------------------------

LIBRARY.define(
    "accumulate_per_sample_squares_(Tensor(a!)? square_sums, Tensor grad_output, Tensor input, "
    "Tensor offsets, Tensor(b!)? sums=None, Tensor? scales=None) -> ()"
)


def check_accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """All but the values of offsets and scales: see check_offsets."""
    op = "accumulate_per_sample_squares_"
    factors = {"grad_output": grad_output, "input": input}
    accumulators = {
        name: tensor
        for name, tensor in (("square_sums", square_sums), ("sums", sums))
        if tensor is not None
    }
    if not accumulators:
        raise ValueError(f"piece_ops.{op}: square_sums or sums must be given, got neither")
    for name, factor in factors.items():
        _check_dtype(op, name, factor, HALVES_AND_FLOAT)
        if factor.dim() != 2:
            raise ValueError(
                f"piece_ops.{op}: {name} must be [tokens, features], got shape "
                f"{tuple(factor.shape)}"
            )
        if factor.stride(1) != 1 and factor.shape[1] > 1 and factor.numel():
            raise ValueError(
                f"piece_ops.{op}: {name} must be contiguous in its last dimension, got strides "
                f"{factor.stride()}; call .contiguous() first if a copy is meant"
            )
    if grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"piece_ops.{op}: input must have {grad_output.shape[0]} tokens like grad_output, "
            f"got {input.shape[0]}"
        )
    shape = (grad_output.shape[1], input.shape[1])
    for name, accumulator in accumulators.items():
        _check_dtype(op, name, accumulator, (torch.float32,))
        if tuple(accumulator.shape) != shape:
            raise ValueError(
                f"piece_ops.{op}: {name} must have shape {shape}, the features of grad_output and "
                f"of input, got {tuple(accumulator.shape)}"
            )
        if not accumulator.is_contiguous():
            raise ValueError(
                f"piece_ops.{op}: {name} must be contiguous, got strides {accumulator.stride()}"
            )
    check_same_device(op, [*accumulators.values(), *factors.values()])
    _check_dtype(op, "offsets", offsets, (torch.int64,))
    if offsets.dim() != 1 or not offsets.numel():
        raise ValueError(
            f"piece_ops.{op}: offsets must be 1-D with one number more than there are samples, "
            f"got shape {tuple(offsets.shape)}"
        )
    on_host = {"offsets": offsets}
    if scales is not None:
        _check_dtype(op, "scales", scales, (torch.float32,))
        if tuple(scales.shape) != (offsets.numel() - 1,):
            raise ValueError(
                f"piece_ops.{op}: scales must have shape ({offsets.numel() - 1},), one number a "
                f"sample, got {tuple(scales.shape)}"
            )
        on_host["scales"] = scales
    for name, tensor in on_host.items():
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(f"piece_ops.{op}: {name} must be on the CPU, got {tensor.device}")


def _check_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"piece_ops.{op}: {name} must be {_name_dtypes(dtypes)}, "
            f"got {_name_dtypes([tensor.dtype])}"
        )


def check_offsets(offsets: Tensor, tokens: int, scales: Tensor | None) -> None:
    """Check that samples follow one another and cover all tokens, and that scales are finite."""
    where = "piece_ops.accumulate_per_sample_squares_"
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != tokens:
        raise ValueError(
            f"{where}: offsets must begin with 0 and end with {tokens} (the number of tokens), "
            f"got {first} and {last}"
        )
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if falls.numel():
        n = int(falls[0])
        raise ValueError(
            f"{where}: offsets must not decrease, got {int(offsets[n + 1])} after "
            f"{int(offsets[n])} at position {n + 1}"
        )
    if scales is not None and not bool(scales.isfinite().all()):
        n = int((~scales.isfinite()).nonzero()[0])
        raise ValueError(f"{where}: scales must be finite, got {float(scales[n])} for sample {n}")


def raise_for_nonfinite_factor(grad_output: Tensor, input: Tensor, which: int, count: int) -> None:
    """What a backend found: which 0 is grad_output, 1 input, negative: all is finite."""
    if which >= 0:
        name, factor = (("grad_output", grad_output), ("input", input))[which]
        raise ValueError(
            f"piece_ops.accumulate_per_sample_squares_: {name} must be finite, got {count} NaN or "
            f"infinite of {factor.numel()}; nothing was added"
        )


@register_fake("accumulate_per_sample_squares_")
def _fake_accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    check_accumulate_per_sample_squares_(square_sums, grad_output, input, offsets, sums, scales)


# ---- select_topk ---------------------------------------------------------------------------------

LIBRARY.define(
    "select_topk(Tensor[] first, Tensor[] second, SymInt[] k, Tensor[] exclude, str score, "
    "float constant, int seed, str nan, str algorithm) "
    "-> (Tensor indices, Tensor counts, Tensor thresholds, Tensor ties_kept)"
)


def check_select_topk(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    k: Sequence[int],
    exclude: Sequence[Tensor],
    score: str,
    constant: float,
    seed: int,
    nan: str,
    algorithm: str,
) -> None:
    """One k: over all tensors together; else one k for each tensor. exclude may be empty."""
    op = "select_topk"
    check_name(op, "score", score, SCORE_CODES)
    check_name(op, "nan", nan, NAN_RULES)
    check_name(op, "algorithm", algorithm, ALGORITHM_CODES)
    if not 0 <= constant < float("inf"):
        raise ValueError(
            f"piece_ops.{op}: constant must be finite and not negative, got {constant}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"piece_ops.{op}: seed must be in 0..2^63-1, got {seed}")
    dtypes = check_tensors(op, "scores", first, FLOATS if score == "plain" else HALVES_AND_FLOAT)
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise TypeError(
            f"piece_ops.{op}: scores must be all float64 or none, got {_name_dtypes(dtypes)}"
        )
    if score in SCORES_WITH_SECOND:
        check_same_count(op, len(first), second=second)
        check_tensors(op, "second", second, HALVES_AND_FLOAT)
        check_same_numel(op, "second", second, "first", first)
    elif second:
        raise ValueError(f"piece_ops.{op}: score {score!r} takes no second statistic, got one")
    if len(k) not in (1, len(first)):
        raise ValueError(
            f"piece_ops.{op}: k must be one number, or one for each of the {len(first)} tensors, "
            f"got {len(k)}"
        )
    if exclude:
        check_same_count(op, len(first), exclude=exclude)
        _check_indices(op, exclude, "exclude")
    check_same_device(op, first, second, exclude)


def check_k(k: Sequence[int], sizes: Sequence[int], excluded: Sequence[int]) -> None:
    """Check each k against its candidates, before the output of that size is allocated."""
    by_tensor = len(k) > 1
    for t, own_k in enumerate(k):
        parts = slice(t, t + 1) if by_tensor else slice(None)
        candidates = sum(sizes[parts]) - sum(excluded[parts])
        if not 0 <= own_k <= candidates:
            where = f" in scores[{t}]" if by_tensor else ""
            left_out = f", {sum(excluded[parts])} excluded" if excluded else ""
            raise ValueError(
                f"piece_ops.select_topk: k must be in 0..{candidates} (the number of scores"
                f"{where}{left_out}), got {own_k}"
            )


@register_fake("select_topk")
def _fake_select_topk(
    first: list[Tensor],
    second: list[Tensor],
    k: list[int],
    exclude: list[Tensor],
    score: str,
    constant: float,
    seed: int,
    nan: str,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_select_topk(first, second, k, exclude, score, constant, seed, nan, algorithm)
    like = first[0]
    # The CUDA backend reads these anyway when it reads its report; they stay on the host.
    device = "cpu" if like.device.type == "cuda" else like.device
    return (
        like.new_empty([sum(k)], dtype=torch.int64),
        like.new_empty([len(first)], dtype=torch.int64, device=device),
        like.new_empty([len(k)], dtype=torch.float64, device=device),
        like.new_empty([len(k)], dtype=torch.int64, device=device),
    )


# ---- sparse_adamw_ -------------------------------------------------------------------------------

LIBRARY.define(
    "sparse_adamw_(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] values, Tensor[] grads, "
    "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, int step, float lr, float beta1, "
    "float beta2, float eps, float weight_decay) -> ()"
)


def check_sparse_adamw_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """grads[t] has as many elements as indices[t] (compact) or as weights[t] (dense)."""
    op = "sparse_adamw_"
    count = len(weights)
    check_same_count(op, count, indices=indices, values=values, grads=grads)
    check_same_count(op, count, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    check_tensors(op, "weights", weights, HALVES_AND_FLOAT)
    _check_indices(op, indices)
    check_tensors(op, "grads", grads, HALVES_AND_FLOAT)
    for argument, tensors in (
        ("values", values),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
    ):
        check_tensors(op, argument, tensors, (torch.float32,))
        check_same_numel(op, argument, tensors, "indices", indices)
    sizes = zip(*(map(Tensor.numel, tensors) for tensors in (grads, indices, weights)), strict=True)
    for t, (got, selected, dense) in enumerate(sizes):
        if got != selected and got != dense:
            raise ValueError(
                f"piece_ops.{op}: grads[{t}] must have {selected} elements (one a selected "
                f"weight) or {dense} (dense), got {got}"
            )
    check_same_device(op, weights, indices, values, grads, exp_avgs, exp_avg_sqs)
    check_adamw_numbers(step, lr, beta1, beta2, eps, weight_decay)


def check_adamw_numbers(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    op = "sparse_adamw_"
    for argument, number, fits, wanted in (
        ("step", step, step >= 1, "at least 1"),
        ("lr", lr, 0 <= lr < float("inf"), "finite and not negative"),
        ("beta1", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("eps", eps, 0 <= eps < float("inf"), "finite and not negative"),
        ("weight_decay", weight_decay, 0 <= weight_decay < float("inf"), "not negative"),
    ):
        if not fits:
            raise ValueError(f"piece_ops.{op}: {argument} must be {wanted}, got {number}")


@register_fake("sparse_adamw_")
def _fake_sparse_adamw_(*args: Any) -> None:
    check_sparse_adamw_(*args)


# ---- gather --------------------------------------------------------------------------------------

LIBRARY.define("gather(Tensor[] sources, Tensor[] indices, ScalarType? dtype=None) -> Tensor[]")


def check_gather(
    sources: Sequence[Tensor], indices: Sequence[Tensor], dtype: torch.dtype | None = None
) -> None:
    """dtype: None (the source's own) or float32."""
    op = "gather"
    check_same_count(op, len(sources), indices=indices)
    check_tensors(op, "sources", sources, FLOATS)
    _check_indices(op, indices)
    check_same_device(op, sources, indices)
    if dtype is None:
        return
    if dtype != torch.float32:
        raise TypeError(
            f"piece_ops.{op}: dtype must be None (the source's own) or float32, got "
            f"{_name_dtypes([dtype])}"
        )
    if torch.float64 in set(map(dtype_of, sources)):
        raise TypeError(f"piece_ops.{op}: float64 sources cannot be gathered into float32")


@register_fake("gather")
def _fake_gather(
    sources: list[Tensor], indices: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    check_gather(sources, indices, dtype)
    return new_values(sources, indices, dtype)


def new_values(
    sources: Sequence[Tensor], indices: Sequence[Tensor], dtype: torch.dtype | None
) -> list[Tensor]:
    """Allocate what gather returns."""
    return [
        source.new_empty([index.numel()], dtype=dtype or source.dtype)
        for source, index in zip(sources, indices, strict=True)
    ]


# ---- scatter_ ------------------------------------------------------------------------------------

LIBRARY.define("scatter_(Tensor(a!)[] targets, Tensor[] indices, Tensor[] values) -> ()")


def check_scatter_(
    targets: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """values[t] is float32, or of targets[t]'s dtype."""
    op = "scatter_"
    check_same_count(op, len(targets), indices=indices, values=values)
    check_tensors(op, "targets", targets, FLOATS)
    _check_indices(op, indices)
    check_tensors(op, "values", values, FLOATS)
    check_same_numel(op, "values", values, "indices", indices)
    for t, (target, value) in enumerate(zip(targets, values, strict=True)):
        if value.dtype not in (target.dtype, torch.float32):
            raise TypeError(
                f"piece_ops.{op}: values[{t}] must be {_name_dtypes([target.dtype])} like its "
                f"target, or float32, got {_name_dtypes([value.dtype])}"
            )
    check_same_device(op, targets, indices, values)


@register_fake("scatter_")
def _fake_scatter_(targets: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    check_scatter_(targets, indices, values)


# ---- total ---------------------------------------------------------------------------------------

LIBRARY.define("total(Tensor[] tensors) -> Tensor")


def check_total(tensors: Sequence[Tensor]) -> None:
    """Any of the four float types."""
    check_tensors("total", "tensors", tensors, FLOATS)
    check_same_device("total", tensors)


@register_fake("total")
def _fake_total(tensors: list[Tensor]) -> Tensor:
    check_total(tensors)
    return tensors[0].new_empty([], dtype=torch.float64)


# ---- sampled_weight_grad -------------------------------------------------------------------------

LIBRARY.define("sampled_weight_grad(Tensor grad_output, Tensor input, Tensor indices) -> Tensor")


def check_sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> None:
    """Two matrices with a row for each token, rows of consecutive elements, any row stride."""
    op = "sampled_weight_grad"
    for argument, matrix in (("grad_output", grad_output), ("input", input)):
        if matrix.dtype not in HALVES_AND_FLOAT:
            raise TypeError(
                f"piece_ops.{op}: {argument} must be {_name_dtypes(HALVES_AND_FLOAT)}, got "
                f"{_name_dtypes([matrix.dtype])}"
            )
        if matrix.dim() != 2:
            raise ValueError(
                f"piece_ops.{op}: {argument} must be a matrix [tokens, features], got shape "
                f"{tuple(matrix.shape)}"
            )
        if not matrix.is_contiguous():
            _check_rows(op, argument, matrix)
    if grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"piece_ops.{op}: input must have {grad_output.shape[0]} tokens like grad_output, got "
            f"{input.shape[0]}"
        )
    _check_indices(op, (indices,))
    if not grad_output.device == input.device == indices.device:
        check_same_device(op, (grad_output, input, indices))


def _check_rows(op: str, argument: str, matrix: Tensor) -> None:
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    is_consecutive = columns <= 1 or column_stride == 1
    if not is_consecutive or (rows > 1 and row_stride < columns):
        raise ValueError(
            f"piece_ops.{op}: {argument} must have rows of consecutive elements that do not "
            f"overlap, got shape {(rows, columns)} with strides {(row_stride, column_stride)}; "
            "call .contiguous() first if a copy is meant"
        )


@register_fake("sampled_weight_grad")
def _fake_sampled_weight_grad(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    check_sampled_weight_grad(grad_output, input, indices)
    return grad_output.new_empty([indices.numel()], dtype=torch.float32)


# ---- backends ------------------------------------------------------------------------------------

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


def bump_versions(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors were written."""
    for tensors in lists:
        if any(map(Tensor.is_inference, tensors)):  # these count no versions
            tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        torch.autograd.graph.increment_version(tensors)
