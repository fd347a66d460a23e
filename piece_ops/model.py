"""Train the chosen coordinates of a model in place, as ordinary parameters.

`PieceModel` keeps, for every dense weight with chosen coordinates, one 1-D float32 parameter: the
master copy of these values. The dense weights are frozen and already hold the values in their own
dtype; what an optimizer does to the values is scattered back. Weights outside the selection are
never written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops import _state
from piece_ops._inject import Target, inject, restore
from piece_ops._sync import check_live, write_changed
from piece_ops._taps import place_taps
from piece_ops._wrap import Forward, ValueTree, make_targets
from piece_ops.delta.record import Delta
from piece_ops.delta.trained import delta_of
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
        The wrapped model, with its own parameter names: its ``state_dict()`` and
        ``save_pretrained()`` are those of an ordinary model.
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
        targets = make_targets(model, selection, "piece_ops.PieceModel")
        self.model = model
        # transformers' Trainer reads the signature to know which columns the model takes.
        self.forward = Forward(model)  # type: ignore[method-assign]
        self._earlier: Delta | None = None  # what earlier selections changed, see reselect_
        self._absent: set[str] = set()
        register: Any = self.register_load_state_dict_post_hook
        register(_after_load)
        self._wrap(targets, selection)

    def _wrap(self, targets: list[Target], selection: Selection) -> None:
        self._frozen = [
            (parameter, parameter.requires_grad) for parameter in self.model.parameters()
        ]
        inject(targets)
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        self.values = ValueTree({target.name: target.values for target in targets})
        self.selection, self._targets = selection, targets
        self._connect()

    def _connect(self) -> None:
        model: Any = self.model
        self._handles: list[Any] = [
            # Of both: trl's trainers give this module a forward that calls parts of the other one.
            self.register_forward_pre_hook(self._before_forward),
            model.register_forward_pre_hook(self._before_forward),
            model.register_state_dict_pre_hook(self._before_state_dict),
        ]
        for target in self._targets:
            values: Any = target.values
            values.piece_target = target  # how SparseAdamW finds the weight
            self._handles.append(values.register_post_accumulate_grad_hook(target.mark_touched))
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

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """The wrapped model's forward; an instance's has that one's signature.

        transformers' Trainer reads the class's, too: arguments with "label" in their names are
        what it needs for a loss in evaluation. Models with other ones need its ``label_names``.
        """
        return self.model(*args, labels=labels, **kwargs)

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
        return write_changed(self._targets)

    def _check_live(self, function: str) -> None:
        check_live(self._targets, f"piece_ops.PieceModel.{function}")

    @property
    def dense_gradients(self) -> dict[str, str]:
        """Selected parameters whose gradient is made densely and then read, each with the reason.

        Norms, convolutions and fused experts are, and modules whose forward was replaced before
        they were wrapped, as accelerate's hooks do. Not listed, since it shows in a forward only:
        a weight that other code reads as an attribute.
        """
        return {target.name: target.dense for target in self._targets if target.dense}

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
        last = delta_of(
            self.model,
            self._targets,
            changed_only=changed_only,
            base=base,
            method=self.selection.method,
            task=task,
            parent=parent,
        )
        if self._earlier is None:
            return last
        whole = self._earlier.then(last)
        return replace(whole, base=last.base, method=last.method, task=task, parent=last.parent)

    def reselect_(self, select: Callable[[nn.Module], Selection]) -> None:
        """Go on with another selection of the same model, in this wrapper.

        What has left the selection stays in the weights as trained, and in `delta`. The values are
        other parameters afterwards: make a new optimizer for them, `SparseAdamW.carry_over` moves
        the state (and the float32 masters). The `state_dict` of a model that has selected again
        loads into this very wrapper only: what earlier selections changed is not in it.

        Parameters
        ----------
        select : callable
            Is given the model, not wrapped, with the weights of this moment; returns a Selection.
            When it fails, everything is as it was.

        Examples
        --------
        >>> import torch, piece_ops
        >>> layer = torch.nn.Linear(3, 2)
        >>> model = piece_ops.PieceModel(layer, piece_ops.estimate(layer, method="random", k=3))
        >>> model.reselect_(lambda layer: piece_ops.estimate(layer, method="magnitude", k=2))
        >>> model.selection.k
        2
        """
        part, targets, selection = self.delta(), self._targets, self.selection
        thawed = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            chosen = select(self.unload())
            targets = make_targets(self.model, chosen, "piece_ops.PieceModel.reselect_")
            selection = chosen
            self._earlier = part
        finally:
            for target in targets:
                target.active = True
            self._wrap(targets, selection)
            for parameter in thawed:
                parameter.requires_grad_(True)

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

    def merge_and_unload(self) -> nn.Module:
        """`unload`, by the name that PEFT has for it: the values are in the weights already."""
        return self.unload()

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

    def save_pretrained(self, folder: str | os.PathLike[str], **settings: Any) -> Path:
        """Write what was trained as a delta, ``piece_delta.safetensors``; return its path.

        All selected coordinates are in it, unchanged ones too, so that `from_pretrained` can go
        on. At most 8 bytes each for 16-bit weights; the masters are rounded like the weights.
        The whole model: ``model.model.save_pretrained()``, or that of `merge_and_unload`'s result.

        Parameters
        ----------
        folder : path
            Made when it is not there.
        **settings
            ``task``, ``base``, ``parent`` of `delta`.
        """
        return self.delta(**settings, changed_only=False).save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload what `save_pretrained` writes; settings are those of `Delta.push_to_hub`."""
        return self.delta(changed_only=False).push_to_hub(repo_id, **settings)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> PieceModel:
        """Apply a saved delta to its base model and wrap that for further training.

        Parameters
        ----------
        model : nn.Module
            The base model, not wrapped.
        source : str or path
            A folder of `save_pretrained`, a file, or a repository on the hub; see
            `Delta.from_pretrained`. The delta's coordinates become the selection.

        Raises
        ------
        ValueError
            When the delta is damaged or was made on another model, which is then untouched.
        """
        delta = Delta.from_pretrained(source, revision=revision, token=token)
        delta.apply_(model)
        try:
            wrapped = cls(
                model, Selection(delta.indices, delta.shapes, delta.total, delta.method or "custom")
            )
        except BaseException:
            delta.revert_(model)
            raise
        for target in wrapped._targets:  # what it has changed is counted from the base
            target.base_values = delta.base_values[target.name].cpu()
        return wrapped

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What training changes: some 8 bytes per selected coordinate, see below.

        Entries: ``values.<name>`` float32 [k_t]; ``positions.<name>`` int32 (int64 from 2^31
        elements on); ``base`` uint8 [32], a digest of the weights that were there before;
        ``model.<name>`` of the wrapped model's buffers and of parameters that were unfrozen. It
        loads into a model wrapped with the same selection of the same base, RuntimeError
        otherwise. The whole model's is ``model.model.state_dict()``.
        """
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        _state.reduce_(state, prefix, self.model, self._targets, self._earlier)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        self._check_live("load_state_dict")
        if metadata.get("assign_to_params_buffers"):
            raise RuntimeError(
                "piece_ops.PieceModel.load_state_dict: assign must be False, since weights and "
                "optimizers know the values that are there, got True"
            )
        self._absent = _state.accept(
            state_dict, prefix, self.model, self._targets, self._earlier, lists[0]
        )
        base: Any = super()
        base._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PieceModel:
        """`to`, `half` and the like: the values stay float32, positions follow their weights."""
        base: Any = super()
        base._apply(fn, recurse)
        for target in self._targets:
            target.indices = target.indices.to(target.weight.device)
            target.synced_version = -1  # the weights have been rounded anew
        place_taps(self._targets)
        return self


def _after_load(model: PieceModel, incompatible: Any) -> None:
    """A hook, run after everything was loaded: values to weights; frozen ones are not missing."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key not in model._absent]
    model._absent = set()
    for target in model._targets:
        target.synced_version = -1
    model.sync_()
