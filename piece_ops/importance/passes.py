"""Forward and backward passes whose gradients are used one tensor at a time.

No gradient outlives its own use: a post-accumulate-grad hook on every candidate hands the fresh
gradient on and drops it at once, so the peak is one gradient (the largest parameter), not all.
The model is left as it was found: ``requires_grad``, the caller's own ``.grad`` tensors, hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Any], Tensor]

# Tensors with one column per token that can lose right padding together with attention_mask.
_TOKEN_WISE = (
    "input_ids",
    "attention_mask",
    "labels",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
)


class GradientStream:
    """Gradients of `parameters`, one at a time, for any number of backward passes.

    Use as a context around the passes; `use` gets (name, gradient) as backward produces them.
    Parameters that are not listed compute no gradient inside the context.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        use: Callable[[str, Tensor], None],
        where: str,
    ) -> None:
        self._model, self._parameters, self._use, self._where = model, parameters, use, where
        self._what = ""
        self.seen: set[str] = set()  # parameters whose gradient this backward has delivered

    @contextmanager
    def running(self) -> Iterator[GradientStream]:
        """Install the hooks; restore everything on the way out, also after an exception."""
        every = list(self._model.parameters())
        before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every]
        wanted = {id(parameter) for parameter in self._parameters.values()}
        handles: list[Any] = []
        try:
            for parameter in every:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
            for name, parameter in self._parameters.items():
                tensor: Any = parameter
                handles.append(tensor.register_post_accumulate_grad_hook(self._hook(name)))
            handles.extend(_keep_checkpoints_connected(self._model))
            with torch.enable_grad():
                yield self
        finally:
            for handle in handles:
                handle.remove()
            for parameter, required, grad in before:
                parameter.requires_grad_(required)
                parameter.grad = grad

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                return
            if name in self.seen:
                raise RuntimeError(
                    f"{self._where}: {name!r} must receive its gradient once per backward, got it "
                    "in parts (a module shared between re-entrant checkpoints); use "
                    "gradient checkpointing with use_reentrant=False"
                )
            if grad.layout != torch.strided:
                grad = grad.to_dense()  # nn.Embedding(sparse=True)
            self.seen.add(name)
            try:
                # Gradients have their parameter's strides: only a channels-last one is copied.
                self._use(name, grad if grad.is_contiguous() else grad.contiguous())
            except ValueError as error:  # not finite: of this gradient nothing was added
                self.seen.discard(name)
                raise ValueError(
                    f"{self._where}: the gradient of {self._what} must be finite; {error}"
                ) from error

        return take

    def backward(self, loss: Tensor, what: str) -> None:
        """One backward pass; raises when no gradient reached any of the parameters."""
        self.seen.clear()
        self._what = what
        run: Any = loss.backward
        run()
        if not self.seen:
            raise ValueError(
                f"{self._where}: the loss of {what} must depend on the candidate parameters, got "
                f"one that reaches none of {len(self._parameters)}"
            )


def _keep_checkpoints_connected(model: nn.Module) -> list[Any]:
    """Let re-entrant checkpoints see an input that requires grad.

    They compute no gradient at all when none of their inputs requires one, and here the input
    embeddings usually do not.
    """
    find = getattr(model, "get_input_embeddings", None)
    if find is None or not any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        return []
    embeddings = find()

    def mark(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.requires_grad:
            output.requires_grad_(True)

    return [embeddings.register_forward_hook(mark)] if embeddings is not None else []


# ------------------------------------------------------------------------------------------ batches


def is_batch(value: Any) -> bool:
    """A mapping, a tensor, or a list or tuple of tensors."""
    if isinstance(value, (Mapping, Tensor)):
        return True
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Tensor) for item in value)
    )


def split_rows(batch: Any, *, trim: bool, where: str) -> list[Any]:
    """The rows of a batch as batches of one (views, no copies).

    Every tensor whose first dimension is the batch size is cut; everything else is passed on as
    it is. The batch size is that of ``input_ids``, or of the first tensor that has a dimension.
    With `trim`, the right padding of a row is cut off (see `_trim`).
    """
    if not is_batch(batch):
        raise TypeError(
            f"{where}: a batch must be a dict of tensors (or a tensor, or a list of tensors, with "
            f"loss_fn), got {type(batch).__name__}"
        )
    items: list[tuple[Any, Any]]
    if isinstance(batch, Mapping):
        items = list(batch.items())
    else:
        items = list(enumerate([batch] if isinstance(batch, Tensor) else batch))
    tensors = [(key, value) for key, value in items if isinstance(value, Tensor) and value.dim()]
    sizes = dict((key, value.shape[0]) for key, value in tensors)
    size = sizes.get("input_ids", next(iter(sizes.values()), 0))
    if size == 0:
        raise ValueError(f"{where}: a batch must have at least one row, got none")
    cut = {key for key, rows in sizes.items() if rows == size}
    result: list[Any] = []
    for row in range(size):
        parts = {key: (value[row : row + 1] if key in cut else value) for key, value in items}
        if isinstance(batch, Mapping):
            result.append(_trim(parts) if trim else parts)
        else:
            result.append(parts[0] if isinstance(batch, Tensor) else type(batch)(parts.values()))
    return result


def _trim(row: dict[str, Any]) -> dict[str, Any]:
    """Cut the right padding off a row: exact for a causal model, and cheaper.

    Only where it can change nothing: `attention_mask` is [1, L] and ends in zeros, the labels
    there are -100, and the other token-wise tensors have length L. Left padding stays.
    """
    mask = row.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or "decoder_input_ids" in row:
        return row
    length = mask.shape[1]
    kept = torch.nonzero(mask[0])
    end = int(kept[-1]) + 1 if kept.numel() else length
    names = [name for name in _TOKEN_WISE if isinstance(row.get(name), Tensor)]
    if end == length or any(row[name].shape[1:2] != (length,) for name in names):
        return row
    labels = row.get("labels")
    if isinstance(labels, Tensor) and bool((labels[:, end:] != -100).any()):
        return row
    return {**row, **{name: row[name][:, :end] for name in names}}


def finite_loss(
    model: nn.Module, batch: Any, loss_fn: LossFunction | None, *, what: str, where: str
) -> Tensor:
    """The loss of one batch, checked: a finite scalar that depends on something trainable."""
    if loss_fn is not None:
        loss: Any = loss_fn(model, batch)
    else:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{where}: without loss_fn a batch must be a dict for model(**batch), got "
                f"{type(batch).__name__}"
            )
        loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{where}: the loss of {what} must be a tensor of one element, got {got}; a batch "
            "needs 'labels', or pass loss_fn(model, batch)"
        )
    if not bool(torch.isfinite(loss.detach()).all()):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        # The first label has no token before it to be predicted from.
        blank = isinstance(labels, Tensor) and bool((labels[..., 1:] == -100).all())
        hint = ": all its labels are -100, so no token counts" if blank else ""
        raise ValueError(f"{where}: the loss of {what} must be finite, got {loss.item()}{hint}")
    if not loss.requires_grad:
        raise ValueError(
            f"{where}: the loss of {what} must depend on the candidate parameters, got one "
            "without gradient"
        )
    return loss.reshape(())
