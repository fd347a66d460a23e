"""Train the chosen coordinates of a model in place, as ordinary parameters.

`PieceModel` keeps, for every dense weight with chosen coordinates, one 1-D float32 parameter: the
master copy of these values. The dense weights are frozen and already hold the values in their own
dtype; what an optimizer does to the values is scattered back. Weights outside the selection are
never written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops._inject import Target, inject, is_injected, owners_of, restore
from piece_ops._taps import place_taps
from piece_ops.delta.record import Delta
from piece_ops.delta.trained import delta_of
from piece_ops.functional import gather, scatter_
from piece_ops.importance.candidates import DTYPES
from piece_ops.selection import Selection


class PieceModel(nn.Module):
    """A model of which only the selected coordinates train.

    The model is wrapped in place: its parameters are frozen, and its modules read weights that
    depend, for autograd, on the values kept here. Forward, ``generate``, ``config`` and every
    other attribute pass through to it.

    Parameters
    ----------
    model : nn.Module
        Any model with float32, bfloat16 or float16 contiguous weights.
    selection : Selection
        At least one coordinate; must fit the model.

    Attributes
    ----------
    model : nn.Module
        The wrapped model, with its own parameter names: ``model.state_dict()`` and
        ``model.save_pretrained()`` write ordinary files.
    values : nn.Module
        Holds the trainable parameters: ``values.<name of the dense parameter>``, float32 [k_t].
    selection : Selection

    Raises
    ------
    ValueError
        When the selection is empty or does not fit (names and shapes are listed), when the model
        is wrapped already, or a weight is not contiguous. The model is then untouched.

    Notes
    -----
    Memory per selected coordinate: 4 bytes of master value, 8 of position, 4 of gradient; 8 more
    where backward keeps some columns of a layer's input instead of the input; and, on the CPU for
    `delta`, the weight's own 2 or 4 of base value.

    Linear layers (``nn.Linear``, transformers' ``Conv1D``) and embeddings compute the selected
    entries of their gradients alone; second derivatives raise. Any other weight, that of a subclass
    with a forward of its own, and one that other code reads as an attribute, gets a dense gradient,
    one at a time, which is read at the positions and freed.

    A bfloat16 weight moves when its rounded master moves: small steps add up in the master.

    `SparseAdamW` updates values and weights in one go. With any other optimizer the values are
    scattered before the next forward of the wrapped model, before its ``state_dict()`` and
    ``save_pretrained()``, and in `unload`. Code that calls a part of the wrapped model directly
    after such a step needs `sync_` first.

    Re-entrant gradient checkpointing computes gradients only when its inputs require them, and the
    embeddings are usually frozen: call ``model.enable_input_require_grads()`` on a transformers
    model, or use ``use_reentrant=False``.

    A whole-module check such as ``type(module) is nn.Linear`` fails on the modules concerned, whose
    class is a subclass until `unload`; ``isinstance`` holds.

    Examples
    --------
    >>> import torch, piece_ops
    >>> layer = torch.nn.Linear(3, 2)
    >>> chosen = piece_ops.Selection(
    ...     {"weight": torch.tensor([1, 5])}, {"weight": (2, 3)}, total=8
    ... )
    >>> model = piece_ops.PieceModel(layer, chosen)
    >>> optimizer = piece_ops.SparseAdamW(model.parameters(), lr=1e-2)
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> layer = model.unload()
    """

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        super().__init__()
        where = "piece_ops.PieceModel"
        targets = _make_targets(model, selection, where)
        frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        inject(targets)
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        self.model = model
        self.values = ValueTree({target.name: target.values for target in targets})
        self.selection = selection
        self._targets, self._frozen = targets, frozen
        # transformers' Trainer reads the signature to know which columns the model takes.
        self.forward = _Forward(model)
        self._connect()

    def _connect(self) -> None:
        for target in self._targets:
            values: Any = target.values
            values.piece_target = target  # how SparseAdamW finds the weight
            values.register_post_accumulate_grad_hook(target.mark_touched)
        model: Any = self.model
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_state_dict_pre_hook(self._before_state_dict),
        ]
        # transformers' tie_weights() asks for parameters by name and checks that they are some.
        model.get_parameter = self._get_parameter

    def _get_parameter(self, target: str) -> nn.Parameter:
        """The wrapped model's ``get_parameter``: the dense parameter, not its trainable alias."""
        with torch.no_grad():
            return type(self.model).get_parameter(self.model, target)

    def _before_forward(self, _model: nn.Module, _inputs: Any) -> None:
        self.sync_()

    def _before_state_dict(self, _model: nn.Module, _prefix: str, _keep: bool) -> None:
        self.sync_()

    def __setstate__(self, state: Any) -> None:
        # A copy: Parameter copies keep neither attributes nor hooks, the modules' hooks are kept.
        base: Any = super()
        base.__setstate__(state)
        for handle in self._handles:
            handle.remove()
        self._connect()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    # ------------------------------------------------------------------------------------- values

    # Reads version counters, so it runs outside compiled graphs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def sync_(self) -> int:
        """Write values that have changed into the dense weights; how many weights were written.

        Changes are seen by the values' version counters, and by comparison when a gradient has
        arrived since the last time (an optimizer may write past the counter, through ``.data``).

        Raises
        ------
        RuntimeError
            After `unload`, or when one of the weights has been replaced by another parameter.
        """
        self._check_live("sync_")
        stale, suspects = [], []
        for target in self._targets:
            if target.values._version != target.synced_version:
                stale.append(target)
            elif target.touched:
                suspects.append(target)
        if suspects:
            held = gather([t.weight for t in suspects], [t.indices for t in suspects])
            for target, now in zip(suspects, held, strict=True):
                if not torch.equal(now, target.values.to(now.dtype)):
                    stale.append(target)
                target.touched = False
        if stale:
            scatter_(
                [target.weight for target in stale],
                [target.indices for target in stale],
                [target.values for target in stale],
            )
            for target in stale:
                target.mark_synced()
        return len(stale)

    def _check_live(self, function: str) -> None:
        for target in self._targets:
            if not target.active:
                raise RuntimeError(
                    f"piece_ops.PieceModel.{function}: the model has been unloaded; wrap it again"
                )
            for module, attribute in target.owners:
                if module._parameters.get(attribute) is not target.weight:
                    raise RuntimeError(
                        f"piece_ops.PieceModel.{function}: the wrapped model must keep its "
                        f"parameters, but {target.name!r} has been replaced; call unload() before "
                        "changing the model"
                    )

    def delta(
        self,
        *,
        task: str = "",
        base: str | None = None,
        parent: str | Delta = "",
        changed_only: bool = True,
    ) -> Delta:
        """What training has changed since the model was wrapped; the model goes on as it is.

        Parameters
        ----------
        task : str
            What was learned; kept in the delta for information.
        base : str, optional
            The base model's id; by default the name that transformers loaded it by.
        parent : str or Delta
            The delta (or its digest) that the model held when it was wrapped, in a task stream.
        changed_only : bool
            Leave out selected coordinates whose bits are what they were (in bfloat16 many, when
            the learning rate is small). Applying and reverting is the same either way.

        Raises
        ------
        ValueError
            When the model has been cast to another dtype since it was wrapped.
        RuntimeError
            After `unload`.
        """
        self.sync_()
        return delta_of(
            self.model,
            self._targets,
            changed_only=changed_only,
            base=base,
            method=self.selection.method,
            task=task,
            parent=parent,
        )

    def unload(self) -> nn.Module:
        """Write the values, give the model its classes and ``requires_grad`` flags back, return it.

        This wrapper, and optimizers of its values, are of no use afterwards.
        """
        self.sync_()
        for handle in self._handles:
            handle.remove()
        del self.model.__dict__["get_parameter"]
        restore(self._targets)
        for target in self._targets:
            target.active = False
        for parameter, required in self._frozen:
            parameter.requires_grad_(required)
        return self.model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """``save_pretrained`` of the wrapped model, after writing the values into it."""
        self.sync_()
        return self.model.save_pretrained(*args, **kwargs)  # type: ignore[operator]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable values and of all parameters of the model."""
        trainable = sum(t.values.numel() for t in self._targets if t.values.requires_grad)
        return trainable, sum(parameter.numel() for parameter in self.model.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in the words that PEFT uses."""
        trainable, every = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || "
            f"trainable%: {100 * trainable / every:.4f}"
        )

    # ---------------------------------------------------------------- saving, moving and copying

    def _repeated_names(self) -> list[tuple[str, str]]:
        """(further name, first name) of each parameter that the model holds more than once."""
        first: dict[int, str] = {}
        pairs = [
            (name, first.setdefault(id(parameter), name))
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
        ]
        return [(name, kept) for name, kept in pairs if name != kept]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Values and dense weights; a tied weight under its first name only.

        So that safetensors, and with it transformers' ``Trainer``, can write it.
        """
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name, _ in self._repeated_names():
            state.pop(f"{prefix}model.{name}", None)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, kept in self._repeated_names():
            if f"{prefix}model.{kept}" in state_dict:
                state_dict.setdefault(f"{prefix}model.{name}", state_dict[f"{prefix}model.{kept}"])
        base: Any = super()
        base._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PieceModel:
        """`to`, `half` and the like: the values stay float32, positions follow their weights."""
        base: Any = super()
        base._apply(fn, recurse)
        for target in self._targets:
            target.indices = target.indices.to(target.weight.device)
            target.synced_version = -1  # the weights have been rounded anew
        place_taps(self._targets)
        return self


class _Forward:
    """Calls a model, with the signature of its forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class ValueTree(nn.Module):
    """Parameters under dotted names: ``values.model.layers.0.mlp.up_proj.weight``."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                # Written directly: a module may bear a name ("type") that register_module refuses.
                node = node._modules.setdefault(part, ValueTree({}))  # type: ignore[assignment]
            node._parameters[leaf] = parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTree:
        def keep_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype != torch.float32 else result

        base: Any = super()
        base._apply(keep_float32, recurse)
        return self


def _make_targets(model: nn.Module, selection: Selection, where: str) -> list[Target]:
    """Check everything there is to check; changes nothing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(selection, Selection):
        raise TypeError(f"{where}: selection must be a Selection, got {type(selection).__name__}")
    if isinstance(model, PieceModel) or any(is_injected(module) for module in model.modules()):
        raise ValueError(
            f"{where}: model must not be wrapped already, got one that is; call its unload() first"
        )
    if selection.k == 0:
        raise ValueError(f"{where}: selection must hold at least one coordinate, got none")
    selection.check_fits(model)
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if name in selection.indices]
    owners = owners_of(model, names)
    for name in names:
        weight = parameters[name]
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"{where}: selected weights must be float32, bfloat16 or float16, got "
                f"{weight.dtype} for {name!r}"
            )
        if not weight.is_contiguous():
            raise ValueError(
                f"{where}: selected weights must be contiguous, got strides {weight.stride()} for "
                f"{name!r}; set its data to data.contiguous() first"
            )
        for module, _ in owners[name]:
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"{where}: modules must be Python modules, got a ScriptModule for {name!r}"
                )
    indices = [selection.indices[name].to(parameters[name].device) for name in names]
    weights = [parameters[name].detach() for name in names]
    targets = []
    for name, positions, held in zip(names, indices, gather(weights, indices), strict=True):
        master = nn.Parameter(held.to(torch.float32, copy=True))
        target = Target(name, parameters[name], positions, master, owners[name], held.cpu())
        target.mark_synced()
        targets.append(target)
    return targets
