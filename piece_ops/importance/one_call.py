"""`estimate`: from batches to a selection in one call, also with little memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from piece_ops.importance.batches import is_batch
from piece_ops.importance.budget import needs_of, peak_of, select_within
from piece_ops.importance.estimator import Importance
from piece_ops.importance.scores import NEEDS
from piece_ops.importance.sources import show_progress, wanted_k
from piece_ops.selection import Selection


def estimate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    method: str = "piece-s",
    density: float | None = None,
    *,
    k: int | None = None,
    progress: bool = False,
    exclude_positions: Mapping[str, Tensor] | Selection | None = None,
    memory_budget: int | None = None,
    **settings: Any,
) -> Selection:
    """Choose the coordinates of a model that matter most for a task, in one call.

    Parameters
    ----------
    model : nn.Module
        Passes run in the mode it is in (``model.eval()`` for gradients without dropout).
    batches : iterable of dicts
        The task: arguments of the model, labels included; every row is one sample. Not looked at
        by the methods magnitude and random, which need none.
    method : str
        One of `METHODS`; see `Importance`.
    density : float in (0, 1], optional
        Chosen share of all parameters; 0.001 when neither it nor `k` is given.
    k : int, optional
        The number of coordinates instead.
    progress : bool
        Show a progress bar (needs tqdm).
    exclude_positions : Selection or dict, optional
        Coordinates that must not be chosen.
    memory_budget : int, optional
        Bytes for accumulators: 4 an element, times the number that the method needs; with
        bfloat16 ones 2, and the float32 sums of one module, in which a batch comes together.
        Where all do not fit, parameters are treated in groups, each with a pass over all batches
        (piece-g: and two over its reference); `batches` must then be the same, in the same order,
        every time they are iterated. If all samples lie in one batch, one pass does for all
        parameters that a batched pass covers (not piece-g); a tied weight stays until its end, so
        it gets a pass of its own where the others do not fit beside it. A matrix that does not fit
        alone, often the embedding with ``embeddings=True``, gets a pass for as many of its rows as
        do; 4 Mi elements of it stay together, and a budget too small for them is an error. The
        selection is the same as without a budget. The k best so far come on top, up to 24 bytes
        each.
    **settings
        Everything else that `Importance` takes: loss_fn, per_sample, include, exclude,
        embeddings, reference, reference_samples, reference_tokens, xi, compat, accumulators, seed.

    Returns
    -------
    Selection

    Examples
    --------
    >>> import torch, piece_ops
    >>> layer = torch.nn.Linear(3, 2)
    >>> piece_ops.estimate(layer, method="magnitude", density=0.25).k
    2
    """
    if density is None and k is None:
        density = 1e-3
    if memory_budget is not None and (type(memory_budget) is not int or memory_budget < 1):
        raise ValueError(
            f"piece_ops.estimate: memory_budget must be a positive number of bytes, an int, got "
            f"{memory_budget!r}"
        )
    importance = Importance(model, method, **settings)
    wanted_k(density, k, importance.total, "piece_ops.estimate")
    if NEEDS[method].data:
        if batches is None or is_batch(batches):
            raise TypeError(
                f"piece_ops.estimate: method {method!r} needs an iterable of batches, got "
                f"{type(batches).__name__}"
            )
        if memory_budget is not None and peak_of(needs_of(importance).values()) > memory_budget:
            wanted, excluded = importance._request(
                density, k, exclude_positions, "piece_ops.estimate"
            )
            return select_within(importance, batches, wanted, memory_budget, excluded, progress)
        importance.run_reference(progress)
        for batch in show_progress(batches, "importance", progress):
            importance.update(batch)
        if not importance.sample_count:
            raise ValueError("piece_ops.estimate: batches must hold at least one batch, got none")
    return importance.select(density=density, k=k, exclude_positions=exclude_positions)
