"""How a module comes to use trainable values inside a frozen dense weight.

The module's class is swapped for a subclass of it. Linear layers and embeddings get a forward that
samples the gradient of the values (`_taps`). For every other module, and for whoever reads a weight
from outside, the subclass has a property in place of the parameter: with gradients on, reading
``module.weight`` gives an alias of the dense weight (no copy) that is, for autograd, a function of
the k values. Backward turns the dense gradient into the gradient of the values and lets go of it.
``module._parameters`` still holds the dense weight, so state dicts, parameter names and tied
weights stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops import _taps

_TARGETS = "_piece_targets"  # in an owner's __dict__: attribute -> Target


@dataclass(eq=False)
class Target:
    """One dense weight with its chosen positions and their float32 master values."""

    name: str
    weight: nn.Parameter
    indices: Tensor
    values: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    base_values: Tensor  # of the weight at the indices when it was wrapped, on the CPU
    synced_version: int = -1  # of values, when the weight last held them
    touched: bool = False  # a gradient has come since, so an optimizer may have stepped
    active: bool = True
    dense: str = ""  # why its gradient is made densely, if it is

    def mark_synced(self) -> None:
        """Note that the weight holds the values as they are now."""
        self.synced_version, self.touched = self.values._version, False

    def mark_touched(self, _values: Tensor) -> None:
        """Note that a gradient has arrived (a post-accumulate-grad hook of the values)."""
        self.touched = True


class _Inject(torch.autograd.Function):
    """Forward: an alias of the weight. Backward: the weight's gradient at the indices."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.set_materialize_grads(False)
        # detach() shares the version counter: a weight written between forward and backward is
        # the error that it should be.
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        if grad is None:
            return None, None, None
        (indices,) = ctx.saved_tensors
        if grad.is_sparse:
            grad = grad.to_dense()  # nn.Embedding(sparse=True)
        # take() reads a transposed or expanded gradient by logical position, without a copy, and
        # asks less of the host than our gather, whose lists pay for many tensors at once.
        return torch.take(grad, indices).to(torch.float32), None, None


inject_values: Any = _Inject.apply


def _property_for(attribute: str) -> property:
    def get(self: nn.Module) -> Any:
        weight = self._parameters.get(attribute)
        target: Target | None = self.__dict__[_TARGETS].get(attribute)
        if target is None or weight is not target.weight:
            return weight if weight is not None else nn.Module.__getattr__(self, attribute)
        if torch.is_grad_enabled() and target.values.requires_grad:
            return inject_values(target.values, weight, target.indices)
        return weight

    return property(get)  # assignment never comes here: nn.Module.__setattr__ handles it


def _flat_weights() -> property:
    """nn.LSTM and its kin read a list of their weights instead of the attributes."""

    def get(self: Any) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def put(self: Any, value: Any) -> None:
        self.__dict__["_flat_weights"] = value

    return property(get, put)


@cache
def _injecting_class(base: Any, attributes: tuple[str, ...], kind: _taps.Kind | None) -> Any:
    """The subclass of `base` with those attributes injected; one for all modules alike."""

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The subclass cannot be found by name, so copies and pickles make it anew.
        found = super(made, self).__reduce_ex__(protocol)
        return (_rebuild, (base, attributes, kind), *found[2:])

    namespace: dict[str, Any] = {name: _property_for(name) for name in attributes}
    if kind is not None:
        namespace["forward"] = _taps.tapped_forward(base, kind)
    if issubclass(base, nn.RNNBase):
        namespace["_flat_weights"] = _flat_weights()
    namespace |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        "_piece_base": base,
    }
    made: Any = type(base)(base.__name__, (base,), namespace)
    return made


def _rebuild(base: type, attributes: tuple[str, ...], kind: _taps.Kind | None) -> Any:
    return object.__new__(_injecting_class(base, attributes, kind))


def is_injected(module: nn.Module) -> bool:
    """Whether the module's weights are already a PieceModel's."""
    return _TARGETS in module.__dict__


def owners_of(model: nn.Module, names: list[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds each named parameter: several for a tied one."""
    parameters = dict(model.named_parameters())
    by_id = {id(parameters[name]): name for name in names}
    owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in by_id:
                owners[by_id[id(parameter)]].append((module, attribute))
    return owners


def inject(targets: list[Target]) -> None:
    """Swap the classes of all owners; `restore` swaps them back."""
    for target in targets:
        reasons = [_taps.why_dense(module) for module, _ in target.owners]
        target.dense = next(filter(None, reasons), "")
    attributes: dict[int, dict[str, Target]] = {}
    modules: dict[int, nn.Module] = {}
    for target in targets:
        for module, attribute in target.owners:
            modules[id(module)] = module
            attributes.setdefault(id(module), {})[attribute] = target
    classes = {}
    for key, module in modules.items():
        base: Any = type(module)
        names = tuple(sorted(attributes[key]))
        classes[key] = _injecting_class(base, names, _taps.kind_of(base))
    for key, module in modules.items():  # nothing below can fail half way
        module.__dict__[_TARGETS] = attributes[key]
        module.__class__ = classes[key]
    _taps.place_taps(targets)


def restore(targets: list[Target]) -> None:
    """Give every owner its own class back."""
    for target in targets:
        for module, _ in target.owners:
            if is_injected(module):
                injected: Any = type(module)
                module.__class__ = injected._piece_base
                del module.__dict__[_TARGETS]
                module.__dict__.pop(_taps.TAP, None)
