"""What modules compute from and which gradients reach their outputs, without weight gradients.

During a pass no parameter requires grad, so autograd computes gradients of activations only. A
forward hook on each tapped module keeps its arguments and puts a gradient hook on its results; no
class is changed and everything is taken off afterwards. The arguments are kept as autograd keeps
its own, so that checkpointing drops and recomputes them and in-place changes are noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# module, its (args, kwargs), its output -> what takes the output's place (None: nothing)
OnCall = Callable[[nn.Module, Any, Any], Any]


def _ignore(_module: nn.Module, _arguments: Any, output: Any) -> Any:
    return output


class _Start(torch.autograd.Function):
    """The same numbers, from here on with gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None


class _Keep(torch.autograd.Function):
    """Holds tensors the way autograd holds those that a backward needs."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        return None


class Taps:
    """Calls of `modules` (each with its own watched parameters) during forward and backward.

    `readers` tells, for the id of every watched parameter that was read in the forward, during
    which of its owners; None stands for none of them (its gradient is then not the taps' alone).
    """

    def __init__(
        self, modules: Mapping[nn.Module, tuple[nn.Parameter, ...]], on_call: OnCall
    ) -> None:
        self._modules, self._on_call = modules, on_call
        self._anchor = torch.zeros((), requires_grad=True)
        self._stack: list[nn.Module] = []
        self._owners: dict[int, set[nn.Module]] = {}
        for module, parameters in modules.items():
            for parameter in parameters:
                self._owners.setdefault(id(parameter), set()).add(module)
        self._joint: list[Any] = []  # hooks on several results: they and the graph hold each other
        self.in_forward = self._paused = False
        self.readers: dict[int, set[nn.Module | None]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Install the hooks, once, and take them off whatever happens."""
        handles: list[Any] = []
        # Hooks would have to be compiled in; a model that is not compiled needs no such import.
        compiled = "torch._dynamo" in sys.modules
        stance: Any = torch.compiler.set_stance if compiled else nullcontext
        try:
            for module in self._modules:
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(
                    module.register_forward_hook(
                        self._leave, prepend=True, with_kwargs=True, always_call=True
                    )
                )
            with stance("force_eager"):
                yield
        finally:
            for handle in [*handles, *self._joint]:
                handle.remove()
            self._joint.clear()
            # Whoever is called holds these taps and accumulators: no cycle for the collector.
            self._on_call = _ignore

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass proper; what runs later recomputes (checkpoints)."""
        self.in_forward = True
        try:
            with _Reads(self._owners, self._stack, self.readers):
                yield
        finally:
            self.in_forward = False
            self._stack.clear()

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Inside, modules may run again: their calls are nobody's business."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if self.in_forward:
            self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.in_forward and self._stack:
            self._stack.pop()
        if self._paused or output is None:  # None: the module raised
            return None
        return self._on_call(module, (args, kwargs), output)

    def keep(self, tensors: list[Tensor]) -> Tensor:
        """Hold tensors for the backward; `kept` gives them back."""
        # Detached, they share memory and version with the originals, but not their graph.
        held: Tensor = _Keep.apply(self._anchor, *[tensor.detach() for tensor in tensors])  # type: ignore[no-untyped-call]
        return held

    def follow(self, output: Any, deliver: Callable[[list[Tensor | None]], None]) -> Any:
        """Have the gradients of a module's floating-point results delivered, in one call.

        `deliver` gets one entry per tensor of the output, None where no gradient arrived. Returns
        what must take the output's place.
        """
        leaves, spec = pytree.tree_flatten(output)
        tensors = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        places = [n for n in tensors if leaves[n].is_floating_point()]
        for n in places:
            if len(places) > 1:
                # One result may be computed from another (a router's scores from its logits); a
                # copy's gradient comes from outside the module alone.
                leaves[n] = leaves[n].clone()
            if not leaves[n].requires_grad:
                leaves[n] = _Start.apply(leaves[n], self._anchor)  # type: ignore[no-untyped-call]

        def sort(grads: Any) -> None:
            by_place = dict(zip(places, grads, strict=True))
            deliver([by_place.get(n) for n in tensors])

        if len(places) == 1:
            # On the node, not on the tensor: after whatever hooks others put on the tensor.
            result = leaves[places[0]]
            place = result.output_nr
            result.grad_fn.register_prehook(lambda grads: sort([grads[place]]))
        elif places:
            hook = register_multi_grad_hook([leaves[n] for n in places], sort)
            self._joint.append(hook)
        return pytree.tree_unflatten(leaves, spec)


class Version:
    """Whether a tensor is written from now on; does not keep its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._alias = tensor.detach()  # shares the version counter
        self._alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._version = self._alias._version

    @property
    def is_old(self) -> bool:
        """The tensor was written since."""
        return self._alias._version != self._version


def kept(held: Tensor) -> list[Tensor]:
    """The tensors of `Taps.keep`; raises where one was changed in place since."""
    node: Any = held.grad_fn
    return list(node.saved_tensors)


class _Reads(TorchFunctionMode):
    """Notes which watched parameters torch functions get, and the innermost owner then running.

    Metadata (shape, dtype) is free to read: what returns no tensor is not noted, except an address.
    """

    def __init__(
        self,
        owners: Mapping[int, set[nn.Module]],
        stack: list[nn.Module],
        readers: dict[int, set[nn.Module | None]],
    ) -> None:
        super().__init__()
        self._owners, self._stack, self._readers = owners, stack, readers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *kwargs.values()) if kwargs else args:
            for item in value if type(value) in (list, tuple) else (value,):
                owners = self._owners.get(id(item))
                if owners is not None and (_has_tensor(result) or func is Tensor.data_ptr):
                    running = (module for module in reversed(self._stack) if module in owners)
                    self._readers.setdefault(id(item), set()).add(next(running, None))
        return result


def _has_tensor(result: Any) -> bool:
    if type(result) in (list, tuple):  # not torch.Size
        return any(isinstance(item, Tensor) for item in result)
    return isinstance(result, Tensor)
