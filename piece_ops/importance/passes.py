"""Forward and backward passes whose gradients are used one tensor at a time.

No gradient outlives its own use: a post-accumulate-grad hook on every candidate hands the fresh
gradient on and drops it at once, so the peak is one gradient (the largest parameter), not all.
The model is left as it was found: ``requires_grad``, the caller's own ``.grad`` tensors, hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Any], Tensor]


@contextmanager
def prepared(model: nn.Module, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only `wanted` requires grad, no parameter holds one, and no keys and values are cached.

    All is restored, whatever happens. (With a cache transformers takes packed batches for one
    sequence a row.)
    """
    chosen = {id(parameter) for parameter in wanted}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    before = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    handles: list[Any] = []
    try:
        for config in caching:
            config.use_cache = False
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        handles = _keep_checkpoints_connected(model)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for config in caching:
            config.use_cache = True
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


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
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._parameters, self._use, self._where = model, parameters, use, where
        self._finish = finish  # after each backward; may raise ValueError as `use` may
        self._what = ""
        self.seen: set[str] = set()  # parameters whose gradient this backward has delivered

    @contextmanager
    def running(self) -> Iterator[GradientStream]:
        """Install the hooks; restore everything on the way out, also after an exception."""
        handles: list[Any] = []
        try:
            for name, parameter in self._parameters.items():
                tensor: Any = parameter
                handles.append(tensor.register_post_accumulate_grad_hook(self._hook(name)))
            with prepared(self._model, self._parameters.values()):
                yield self
        finally:
            for handle in handles:
                handle.remove()

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
                raise self._not_finite(error) from error

        return take

    def _not_finite(self, error: ValueError) -> ValueError:
        return ValueError(f"{self._where}: the gradient of {self._what} must be finite; {error}")

    def backward(self, loss: Tensor, what: str, *, must_reach: bool = True) -> None:
        """One backward pass; raises when no gradient reached any of the parameters."""
        self.seen.clear()
        self._what = what
        run: Any = loss.backward
        run()
        try:
            self._finish()
        except ValueError as error:
            raise self._not_finite(error) from error
        if must_reach and not self.seen:
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


def loss_of(
    model: nn.Module, batch: Any, loss_fn: LossFunction | None, *, what: str, where: str
) -> Tensor:
    """The loss of one batch: one number."""
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
    return loss.reshape(())


def check_loss(
    loss: Tensor, batch: Any, *, what: str, where: str, must_depend: bool = True
) -> None:
    """Raise when the loss is NaN or infinite, or depends on nothing trainable."""
    if not bool(torch.isfinite(loss.detach())):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        # The first label has no token before it to be predicted from.
        blank = isinstance(labels, Tensor) and bool((labels[..., 1:] == -100).all())
        hint = ": all its labels are -100, so no token counts" if blank else ""
        raise ValueError(f"{where}: the loss of {what} must be finite, got {loss.item()}{hint}")
    if must_depend and not loss.requires_grad:
        raise ValueError(
            f"{where}: the loss of {what} must depend on the candidate parameters, got one "
            "without gradient"
        )
