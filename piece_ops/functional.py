"""The ops as documented functions.

Every function takes one array, a list, a tuple or a dict of arrays and returns results arranged
like its input, each of the array type and on the device of its own entry. An *array* is of PyTorch,
NumPy (bfloat16 of ml_dtypes too), JAX, CuPy, or any object with ``__dlpack__`` or
``__cuda_array_interface__``; what is changed in place must be mutable, so no JAX
(``docs/interop.md``). Errors are ``ValueError`` or ``TypeError`` that say where, wanted, got. No
function copies an input, changes one that it does not name with a trailing underscore, or keeps any
state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from piece_ops import backends as backends  # registers the implementations
from piece_ops._arrays import Arrangement
from piece_ops._foreign import as_tensor, torch_dtype
from piece_ops._topk import Score, TopK
from piece_ops.backends import cuda, cuda_maxima, cuda_select_topk
from piece_ops.backends.cuda_maxima import ChunkMaxima
from piece_ops.backends.cuda_select_topk import Arguments, Found

Array = Any  # of any library
Tensors = Any  # an array, or a list, tuple or dict of them; mirrored in the result
_ops = torch.ops.piece_ops

__all__ = [
    "ChunkMaxima",
    "Score",
    "TopK",
    "accumulate_per_sample_squares_",
    "accumulate_squares_",
    "gather",
    "sampled_weight_grad",
    "scatter_",
    "select_topk",
    "sparse_adamw_",
    "total",
]


def select_topk(
    scores: Tensors | Score,
    k: int | Sequence[int],
    scope: Literal["global", "tensor"] = "global",
    exclude: Tensors = None,
    nan: Literal["raise", "lowest"] = "raise",
    *,
    algorithm: Literal["auto", "filter", "radix"] = "auto",
    maxima: ChunkMaxima | None = None,
) -> TopK:
    """Select the k largest scores of many tensors together, exactly, without concatenating them.

    The order is total, so the result is unique: larger score first, equal scores by smaller
    position in the caller's order (tensors in order, row-major inside). It is the same for every
    thread count and instruction set, bit for bit.

    Parameters
    ----------
    scores : array, list, tuple or dict of arrays, or Score
        float32, bfloat16 and float16 (also mixed), or all float64; any shapes, contiguous, on one
        device. Not changed. A `Score` is computed on the fly.
    k : int, or sequence of int
        How many, 0 <= k <= number of candidates. With scope "tensor": from each tensor, the same
        number or one number each.
    scope : {"global", "tensor"}
        Rank all tensors together, or each by itself.
    exclude : arranged like scores, optional
        int64 positions that must not be selected, strictly increasing in each tensor. None, and a
        missing key of a dict, exclude nothing.
    nan : {"raise", "lowest"}
        NaN is an error that names the tensor and the count, or ranks below -inf. +inf is the
        largest score; -0 equals 0.
    algorithm : {"auto", "filter", "radix"}
        "filter": a bound from a sample, one read, verified by count (then "radix" if it missed).
        "radix": digit histograms, two to four reads, whatever the data. "auto": "filter", but for
        k above a quarter of all.
    maxima : ChunkMaxima, optional
        What accumulation left for these scores on a GPU, so that less is read; the result is the
        same. Of no use with scope "tensor".

    Returns
    -------
    TopK

    Raises
    ------
    ValueError
        k out of range; NaN; a non-contiguous, badly arranged or foreign-device tensor.
    TypeError
        A dtype that is not listed (integers, for instance).

    Notes
    -----
    Cost: about one read of the scores and 24 bytes a selected element; extra memory about 20 bytes
    a selected element plus 0.5 % of the scores. Below some 10,000 elements the call itself
    dominates. Algorithm and traffic: ``csrc/cpu/select_topk.cpp``; contract:
    ``docs/contracts.md``.

    Examples
    --------
    >>> import piece_ops, torch
    >>> scores = {"a": torch.tensor([[1.0, 5.0], [5.0, 2.0]]), "b": torch.tensor([5.0, 7.0])}
    >>> top = piece_ops.select_topk(scores, 3)
    >>> top.indices
    {'a': tensor([1, 2]), 'b': tensor([1])}
    >>> top.threshold, top.ties_kept
    (5.0, 2)
    """
    op = "select_topk"
    if scope not in ("global", "tensor"):
        raise ValueError(f"piece_ops.{op}: scope must be 'global' or 'tensor', got {scope!r}")
    if isinstance(scores, Score):
        kind, constant, seed = scores.kind, scores.constant, scores.seed
        given = Arrangement(op, "scores", scores.first)
        second = given.match("second", scores.second) if scores.second is not None else []
    else:
        kind, constant, seed = "plain", 0.0, 0
        given = Arrangement(op, "scores", scores)
        second = []
    ks = _counts(k, scope, given)
    if not len(given):
        if any(ks):
            raise ValueError(f"piece_ops.{op}: k must be in 0..0 (there are no scores), got {k}")
        empty = given.rebuild([])
        is_global = scope == "global"
        return TopK(empty, float("inf") if is_global else empty, 0 if is_global else empty)
    excluded = [] if exclude is None else _excluded(given, exclude)
    with given.naming_errors():
        arguments = (given.tensors, second, ks, excluded, kind, constant, seed, nan, algorithm)
        known = []
        if maxima is not None and scope == "global" and cuda_maxima.takes(given.tensors):
            known = maxima.of(given.tensors, second, kind, constant)
        if known:
            found: Found | None = cuda_select_topk.select(Arguments(*arguments, known))
        else:
            found = cuda_select_topk.select_known(Arguments(*arguments, []))
        if found is None:
            indices, *numbers = _ops.select_topk(*arguments)
            found = Found(indices, *(x.tolist() for x in numbers))
        parts = given.split(found.indices, found.counts)
    if scope == "global":
        return TopK(parts, found.thresholds[0], found.ties_kept[0])
    return TopK(parts, given.rebuild(found.thresholds), given.rebuild(found.ties_kept))


def _counts(k: int | Sequence[int], scope: str, given: Arrangement) -> list[int]:
    """One k (global), or one for each tensor."""
    op = "select_topk"
    ks = [k] if not isinstance(k, Sequence) else list(k)
    for number in ks:
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise TypeError(
                f"piece_ops.{op}: k must be an int, got {type(number).__name__} {number!r}"
            )
        if not 0 <= number < 2**63:
            total = sum(tensor.numel() for tensor in given.tensors)
            raise ValueError(
                f"piece_ops.{op}: k must be in 0..{total} (the number of scores), got {number}"
            )
    ks = [int(number) for number in ks]
    if scope == "global":
        if isinstance(k, Sequence):
            raise TypeError(f"piece_ops.{op}: k must be one int for scope 'global', got {k!r}")
        return ks
    if not isinstance(k, Sequence):
        return ks * len(given)
    if len(ks) != len(given):
        raise ValueError(
            f"piece_ops.{op}: k must be one int, or one for each of the {len(given)} tensors, "
            f"got {len(ks)}"
        )
    return ks


def _excluded(given: Arrangement, exclude: Tensors) -> list[Tensor]:
    entries = given.match_optional("exclude", exclude)
    device = given.tensors[0].device
    none = torch.empty(0, dtype=torch.int64, device=device)
    return [none if entry is None else entry for entry in entries]


def accumulate_squares_(
    square_sums: Tensors | None,
    grads: Tensors,
    sums: Tensors | None = None,
    weight: float = 1.0,
    *,
    maxima: ChunkMaxima | None = None,
) -> None:
    """Add the squares of gradients, and if asked the gradients, to float32 accumulators in place.

    ``square_sums += weight * (grads * grads)``; ``sums += weight * grads``; in float32 exactly as
    written, whatever the gradients' dtype.

    Parameters
    ----------
    square_sums : arranged like grads, or None
        float32 accumulators, as many elements as their gradient, contiguous. Changed in place.
        None leaves them out (then sums must be given).
    grads : array, list, tuple or dict of arrays
        float32, bfloat16 or float16, any shapes, contiguous. Not changed.
    sums : arranged like grads, optional
        float32 accumulators likewise.
    weight : float
        Positive; 1 adds plain sums.
    maxima : ChunkMaxima, optional
        Gets the largest score of every 32 elements, on a GPU, for `select_topk`.

    Raises
    ------
    ValueError
        A NaN or infinite gradient (names the tensor and the count), or arguments that do not fit.
        Nothing of the call is added then.
    TypeError
        A dtype that is not listed.

    Notes
    -----
    Cost: 12 bytes an element for bfloat16 gradients and square sums only (2 of them look for
    non-finite values first); no scratch. Bitwise the same for any thread count.

    Examples
    --------
    >>> import piece_ops, torch
    >>> square_sums = torch.zeros(2)
    >>> piece_ops.accumulate_squares_(square_sums, torch.tensor([1.0, -3.0]))
    >>> square_sums
    tensor([1., 9.])
    """
    op = "accumulate_squares_"
    given = Arrangement(op, "grads", grads)
    squares, totals = (
        [] if value is None else given.match(argument, value, is_written=True)
        for argument, value in (("square_sums", square_sums), ("sums", sums))
    )
    if not len(given):
        return
    factor = _number(op, "weight", weight)
    with given.naming_errors():
        if maxima is not None and cuda_maxima.takes(given.tensors):
            maxima.accumulate(squares, given.tensors, totals, factor)
        elif not cuda.accumulate_known(squares, given.tensors, totals, factor):
            _ops.accumulate_squares_(squares, given.tensors, totals, factor)


def accumulate_per_sample_squares_(
    square_sums: Array | None,
    grad_output: Array,
    input: Array,
    offsets: Array | None = None,
    sums: Array | None = None,
    scales: Array | None = None,
) -> None:
    """Add every sample's squared weight gradient of a Linear, none of which is ever formed.

    With G_n and X_n the tokens of sample n in ``grad_output`` and ``input``:
    ``square_sums += sum_n (scales[n] G_n^T X_n)^2`` and ``sums += sum_n scales[n] G_n^T X_n``, in
    float32, tile by tile. One batched backward so gives the exact squared gradient of each of its
    samples.

    Parameters
    ----------
    square_sums : array [out, in], or None
        float32 accumulator of a weight [out, in], contiguous. Changed in place. None leaves it
        out (then sums must be given). For a weight stored as [in, out], swap the two matrices.
    grad_output : array [..., out]
        The gradient of the layer's outputs, float32, bfloat16 or float16, features contiguous,
        tokens at any one distance from each other. Not changed.
    input : array [..., in]
        What the layer computed from, likewise (the dtypes may differ), with the same leading
        dimensions.
    offsets : int64 array [n + 1] on the CPU, optional
        Sample n is the tokens ``offsets[n]`` to ``offsets[n + 1] - 1`` of all, counted over the
        leading dimensions; it may be empty. From 0 to the number of tokens, never decreasing.
        None: each row of the first dimension is one sample, as in an ordinary [n, L, out] batch,
        whose padded tokens have gradient 0.
    sums : array [out, in], optional
        float32 accumulator likewise.
    scales : float32 array [n] on the CPU, optional
        A factor for each sample's gradient, finite; None: 1. With the mean over a batch's tokens
        as the loss, (tokens of the batch) / (tokens of sample n) gives sample n's own mean.

    Raises
    ------
    ValueError
        NaN or infinity in grad_output or input (names it and their count), offsets that do not
        cover the tokens or decrease, arguments that do not fit. Nothing of the call is added.
    TypeError
        A dtype that is not listed.

    Notes
    -----
    Cost: the multiplications of the batch's ordinary weight gradient, whatever the number of
    samples, and one read and write of each accumulator; scratch: the size of input in float32, at
    most some 64 MiB. The same bits for any thread count; between instruction sets and devices the
    last places differ. Algorithm: ``csrc/cpu/accumulate_per_sample_squares.cpp``.

    Examples
    --------
    >>> import piece_ops, torch
    >>> grad_output = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])  # two samples of two tokens
    >>> input = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [5.0, 5.0]]])
    >>> square_sums = torch.zeros(1, 2)
    >>> piece_ops.accumulate_per_sample_squares_(square_sums, grad_output, input)
    >>> square_sums  # of the gradients [3, 2] and [0, 3]
    tensor([[ 9., 13.]])
    """
    op = "accumulate_per_sample_squares_"
    squares, totals = (
        None if value is None else as_tensor(op, name, value, is_written=True)
        for name, value in (("square_sums", square_sums), ("sums", sums))
    )
    gradient, inputs = (
        as_tensor(op, name, value, is_written=False)
        for name, value in (("grad_output", grad_output), ("input", input))
    )
    if gradient.dim() < 2 or gradient.shape[:-1] != inputs.shape[:-1]:
        raise ValueError(
            f"piece_ops.{op}: grad_output and input must be [..., features] with the same leading "
            f"dimensions, at least one, got shapes {tuple(gradient.shape)} and "
            f"{tuple(inputs.shape)}"
        )
    if offsets is None:
        samples, *tokens = gradient.shape[:-1]
        bounds = torch.arange(samples + 1) * math.prod(tokens)
    else:
        bounds = as_tensor(op, "offsets", offsets, is_written=False)
    factors = None if scales is None else as_tensor(op, "scales", scales, is_written=False)
    rows, columns = _tokens(op, "grad_output", gradient), _tokens(op, "input", inputs)
    _ops.accumulate_per_sample_squares_(squares, rows, columns, bounds, totals, factors)


def _tokens(op: str, argument: str, tensor: Tensor) -> Tensor:
    """[..., features] as [tokens, features], never by a copy."""
    try:
        return tensor.view(-1, tensor.shape[-1]) if tensor.numel() else tensor.flatten(0, -2)
    except RuntimeError:
        raise ValueError(
            f"piece_ops.{op}: {argument} must have leading dimensions that merge into one, got "
            f"shape {tuple(tensor.shape)} with strides {tensor.stride()}; call .contiguous() "
            "first if a copy is meant"
        ) from None


def sparse_adamw_(
    weights: Tensors,
    indices: Tensors,
    values: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """One AdamW step on selected weights of many tensors: gather, update, scatter, in one call.

    The float32 ``values`` are the master copies; after their update they are rounded to nearest
    even into the weights. Equals ``torch.optim.AdamW`` on the values (decoupled decay, on the
    selected weights only). Every other weight keeps its bits.

    Parameters
    ----------
    weights : array, list, tuple or dict of arrays
        float32, bfloat16 or float16, any shapes, contiguous. Changed at indices.
    indices : arranged like weights
        int64, flat, strictly increasing positions.
    values, exp_avgs, exp_avg_sqs : arranged like weights
        float32, one number for each index. Changed in place.
    grads : arranged like weights
        float32, bfloat16 or float16: one number for each index, or the dense gradient, from which
        the entries at indices are taken.
    step : int
        Number of this step, from 1.
    lr, betas, eps, weight_decay : float
        As in ``torch.optim.AdamW``.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit; positions out of range or not increasing. Nothing is changed.

    Notes
    -----
    Cost: about 164 bytes a selected weight (most of it the cache line of the weight); no scratch.
    State: 8 bytes of moments and 4 of master a selected weight.

    Examples
    --------
    >>> import piece_ops, torch
    >>> weight, index = torch.ones(4), torch.tensor([2])
    >>> values, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
    >>> piece_ops.sparse_adamw_(weight, index, values, torch.ones(1), m, v, step=1, lr=0.5,
    ...                         weight_decay=0.0)
    >>> weight
    tensor([1.0000, 1.0000, 0.5000, 1.0000])
    """
    op = "sparse_adamw_"
    given = Arrangement(op, "weights", weights, is_written=True)
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"piece_ops.{op}: step must be an int, got {type(step).__name__} {step!r}")
    numbers = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps}
    numbers["weight_decay"] = weight_decay
    if not len(given):
        return
    arguments = (
        given.tensors,
        given.match("indices", indices),
        given.match("values", values, is_written=True),
        given.match("grads", grads),
        given.match("exp_avgs", exp_avgs, is_written=True),
        given.match("exp_avg_sqs", exp_avg_sqs, is_written=True),
    )
    with given.naming_errors():
        _ops.sparse_adamw_(*arguments, step, *(_number(op, *item) for item in numbers.items()))


def _number(op: str, argument: str, value: object) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(
            f"piece_ops.{op}: {argument} must be a number, got {type(value).__name__} {value!r}"
        )
    return float(value)


def gather(sources: Tensors, indices: Tensors, dtype: Any = None) -> Tensors:
    """Read the elements of many tensors at flat positions.

    Parameters
    ----------
    sources : array, list, tuple or dict of arrays
        float32, bfloat16, float16 or float64, any shapes, contiguous. Not changed.
    indices : arranged like sources
        int64, flat, strictly increasing positions.
    dtype : torch.float32 (or NumPy's, or its name), optional
        Widen to it; None keeps each source's own dtype.

    Returns
    -------
    arranged like sources
        1-D, one element for each index.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit; positions out of range or not increasing.

    Examples
    --------
    >>> import piece_ops, torch
    >>> piece_ops.gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 3]))
    tensor([1., 4.])
    """
    given = Arrangement("gather", "sources", sources)
    if not len(given):
        return given.rebuild([])
    positions = given.match("indices", indices)
    wanted = torch_dtype("gather", dtype)
    with given.naming_errors():
        return given.rebuild(_ops.gather(given.tensors, positions, wanted))


def scatter_(targets: Tensors, indices: Tensors, values: Tensors) -> None:
    """Write values into many tensors at flat positions; nothing else is written.

    Parameters
    ----------
    targets : array, list, tuple or dict of arrays
        float32, bfloat16, float16 or float64, any shapes, contiguous. Changed at indices.
    indices : arranged like targets
        int64, flat, strictly increasing positions.
    values : arranged like targets
        One for each index: of the target's dtype (copied bit for bit), or float32 (rounded to
        nearest even).

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit; positions out of range or not increasing. Nothing is changed.

    Examples
    --------
    >>> import piece_ops, torch
    >>> target = torch.zeros(3)
    >>> piece_ops.scatter_(target, torch.tensor([1]), torch.tensor([7.0]))
    >>> target
    tensor([0., 7., 0.])
    """
    given = Arrangement("scatter_", "targets", targets, is_written=True)
    if not len(given):
        return
    positions, numbers = given.match("indices", indices), given.match("values", values)
    with given.naming_errors():
        _ops.scatter_(given.tensors, positions, numbers)


def total(tensors: Tensors) -> float:
    """Sum all elements of many tensors in float64, in an order that only their sizes decide.

    Parameters
    ----------
    tensors : array, list, tuple or dict of arrays
        float32, bfloat16, float16 or float64, any shapes, contiguous.

    Returns
    -------
    float
        The same bits for any thread count and instruction set; 0.0 for no elements.

    Examples
    --------
    >>> import piece_ops, torch
    >>> piece_ops.total([torch.ones(3), torch.ones(2)])
    5.0
    """
    given = Arrangement("total", "tensors", tensors)
    if not len(given):
        return 0.0
    with given.naming_errors():
        return float(_ops.total(given.tensors))


def sampled_weight_grad(grad_output: Any, input: Any, indices: Any) -> Any:
    """Compute selected entries of a Linear's weight gradient, without the others.

    With a row of ``grad_output`` and of ``input`` for each token t and a weight [out, in], the
    entry at flat position ``i * in + j`` is ``sum_t grad_output[t, i] * input[t, j]``. The two
    matrices play the same part: for a weight stored as [in, out] (transformers' Conv1D) pass
    ``input`` first and ``grad_output`` second.

    Parameters
    ----------
    grad_output : array [..., out]
        float32, bfloat16 or float16: the gradient with respect to the layer's output. Leading
        dimensions are tokens. Rows of consecutive elements; the stride from row to row is free,
        so a view of a larger activation is taken without a copy.
    input : array [..., in]
        Likewise, with as many tokens; its dtype may differ. What the layer was given; or only
        some of its columns, with indices into a weight of that width.
    indices : array
        int64, flat, strictly increasing positions in 0 .. out * in - 1.

    Returns
    -------
    array, float32, 1-D
        One number for each index; zeros if there are no tokens. Products and sums are float32 in
        one fixed order, so the bits do not depend on threads or instruction set; but on CUDA rows
        of the weight of which 0.5 % (float32: 3 %) or more is wanted are added up in the order of
        torch's matrix product. NaN and infinities go through as arithmetic has it.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit; positions out of range or not increasing.

    Notes
    -----
    Cost: every used column of both matrices is read once, and each index adds ``tokens`` products.

    Examples
    --------
    >>> import piece_ops, torch
    >>> grad_output, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    >>> piece_ops.sampled_weight_grad(grad_output, x, torch.tensor([1]))  # 2 * 5 + 4 * 6
    tensor([34.])
    """
    op = "sampled_weight_grad"
    given = Arrangement(op, "indices", as_tensor(op, "indices", indices, is_written=False))
    matrices = [
        _as_matrix(op, argument, as_tensor(op, argument, value, is_written=False))
        for argument, value in (("grad_output", grad_output), ("input", input))
    ]
    with given.naming_errors():
        result = _ops.sampled_weight_grad(*matrices, *given.tensors)
    return result.numpy() if isinstance(grad_output, np.ndarray) else result


def _as_matrix(op: str, argument: str, tensor: Tensor) -> Tensor:
    """View [..., features] as [tokens, features]."""
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() == 0:
        raise ValueError(f"piece_ops.{op}: {argument} must have features in rows, got a scalar")
    try:
        return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"piece_ops.{op}: {argument} must be a view of [tokens, features], got shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}; call .contiguous() first if "
            "a copy is meant"
        ) from None
