"""`Delta`: the coordinates that a task changed, with their values before and after."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piece_ops._schema import FLOATS
from piece_ops.delta import algebra, file, hub, live, table
from piece_ops.selection import check_positions


@dataclass(frozen=True, eq=False)
class Delta:
    """What a task changed in a model: coordinates, their new values and their old ones.

    Made by `PieceModel.delta`, `diff` or `Delta.load`; applied and reverted bit for bit.

    Parameters
    ----------
    indices : dict of str to Tensor, int64, shape [k_t]
        Per parameter name (as in ``model.named_parameters()``) the flat positions in the
        parameter's row-major order, strictly increasing, at least one each.
    values : dict of str to Tensor, shape [k_t]
        What the task left at these positions, in the weight's dtype (absolute, not added).
    base_values : dict of str to Tensor, shape [k_t]
        What stood there before, in the weight's dtype.
    shapes : dict of str to tuple of int
        Shape of every parameter of the base model.
    dtypes : dict of str to torch.dtype
        Dtype of every parameter of the base model.
    fingerprint : str
        Of the base model's content, see ``docs/delta_format.md``.
    base : str
        Name of the base model: its hub id or folder; empty when unknown. Information only.
    method, task : str
        How the coordinates were chosen, and what for. Information only.
    parent : str
        `digest` of the delta that the base model already held, or empty.
    tip : str
        Of several deltas made one by `then`: `digest` of the last of them; otherwise empty.

    Attributes
    ----------
    k, total : int
        Coordinates here, and elements of all parameters.
    digest : str
        SHA-256 of everything above: the delta's identity, and what its file is checked with.

    Raises
    ------
    ValueError, TypeError
        When the parts do not fit together; the text names the parameter.

    Examples
    --------
    >>> import torch, piece_ops
    >>> model = torch.nn.Linear(3, 2)
    >>> chosen = piece_ops.Selection(
    ...     {"weight": torch.tensor([1, 5])}, {"weight": (2, 3)}, total=8
    ... )
    >>> trained = piece_ops.PieceModel(model, chosen)
    >>> with torch.no_grad():
    ...     _ = trained.values.weight.add_(1.0)
    >>> delta = trained.delta(task="mail")
    >>> model = trained.unload()
    >>> delta.revert_(model)  # the model as it was before
    >>> with delta.applied(model):
    ...     _ = model(torch.ones(1, 3))
    """

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    base_values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    fingerprint: str
    base: str = ""
    method: str = ""
    task: str = ""
    parent: str = ""
    tip: str = ""
    k: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        where = "piece_ops.Delta"
        for kind in ("values", "base_values"):
            found: dict[str, Tensor] = getattr(self, kind)
            if found.keys() != self.indices.keys():
                odd = sorted(found.keys() ^ self.indices.keys())
                raise ValueError(
                    f"{where}: indices and {kind} must have the same names, got {len(odd)} in one "
                    f"of them only: {odd[:5]}"
                )
        if self.shapes.keys() != self.dtypes.keys():
            odd = sorted(self.shapes.keys() ^ self.dtypes.keys())
            raise ValueError(
                f"{where}: shapes and dtypes must have the same names, got {len(odd)} in one of "
                f"them only: {odd[:5]}"
            )
        for name in self.indices:
            if name not in self.shapes:
                raise ValueError(f"{where}: every parameter needs its shape, got none for {name!r}")
            self._check_tensors(name, math.prod(self.shapes[name]), where)
        object.__setattr__(self, "k", sum(part.numel() for part in self.indices.values()))
        object.__setattr__(self, "total", sum(math.prod(s) for s in self.shapes.values()))

    def _check_tensors(self, name: str, numel: int, where: str) -> None:
        positions, dtype = self.indices[name], self.dtypes[name]
        check_positions(positions, numel, name, where)
        if positions.numel() == 0:
            raise ValueError(f"{where}: {name!r} must have a position, got none; leave it out")
        if dtype not in FLOATS:
            raise TypeError(
                f"{where}: changed weights must be float32, bfloat16, float16 or float64, got "
                f"{dtype} for {name!r}"
            )
        for kind in ("values", "base_values"):
            part = getattr(self, kind)[name]
            if part.dtype != dtype:
                raise TypeError(
                    f"{where}: {kind} of {name!r} must be {dtype} like the weight, got {part.dtype}"
                )
            if part.shape != positions.shape:
                raise ValueError(
                    f"{where}: {kind} of {name!r} must have {positions.numel()} elements, one for "
                    f"each position, got shape {list(part.shape)}"
                )
            if part.device != positions.device:
                raise ValueError(
                    f"{where}: {kind} of {name!r} must be on {positions.device} like the "
                    f"positions, got {part.device}"
                )

    @property
    def density(self) -> float:
        """Share of all elements that is changed, k / total."""
        return self.k / self.total if self.total else 0.0

    @property
    def digest(self) -> str:
        """SHA-256 of the content, as its file stores it (64 hexadecimal digits)."""
        found = self.__dict__.get("_digest")
        if found is None:
            found = file.digest_of(self)
            object.__setattr__(self, "_digest", found)
        return str(found)

    def __repr__(self) -> str:
        named = f"task={self.task!r}, " if self.task else ""
        return (
            f"Delta({named}k={self.k:,} of {self.total:,} ({100 * self.density:.4g} %), in "
            f"{len(self.indices)} of {len(self.shapes)} parameters, digest={self.digest[:12]})"
        )

    def to(self, device: torch.device | str) -> Delta:
        """The same delta with its tensors on `device`: swaps on a GPU then copy nothing there."""
        moved: dict[str, Any] = {
            kind: {name: part.to(device) for name, part in getattr(self, kind).items()}
            for kind in ("indices", "values", "base_values")
        }
        return replace(self, **moved)

    # --------------------------------------------------------------------------------------- file

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file (``docs/delta_format.md``), atomically.

        At most 8 bytes per coordinate for 16-bit weights (4 of position, 2 of value, 2 of base
        value), 12 for float32, and a header that grows with the number of parameters, not with k.

        Raises
        ------
        OSError
            When it cannot be written; what was at `path` is then untouched.
        """
        file.write(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read a file of `save`.

        Raises
        ------
        FileNotFoundError
            When there is no such file.
        ValueError
            When it is truncated, damaged (its digest does not fit its content), of another format
            or version, or when its content does not hold together. The text names the tensor.
        """
        return file.read(path, cls)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``piece_delta.safetensors`` into a folder, and a README.md if it has none.

        Returns the file's path. The folder is made when it is not there.
        """
        return hub.save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a sparse delta",
    ) -> str:
        """Upload what `save_pretrained` writes to a model repository, made when it is not there.

        Needs huggingface_hub, whose errors come through as they are. Returns the commit's address.
        """
        return hub.push_to_hub(
            self, repo_id, private=private, revision=revision, token=token, message=commit_message
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Delta:
        """Load from a folder of `save_pretrained`, a file, or a repository on the hub.

        Errors as of `load`; those of huggingface_hub, needed for the hub only, as they are.
        """
        return cls.load(hub.path_of(source, revision=revision, token=token))

    # --------------------------------------------------------------------------------- live model

    def apply_(self, model: nn.Module, *, strict: bool = True) -> None:
        """Write `values` into the model; everything is checked before anything is written.

        Parameters
        ----------
        model : nn.Module
            The base model, with the parameter names that the delta knows. Not a `PieceModel`:
            call its ``unload`` first.
        strict : bool
            True: the model must be the one that the delta was made on: the same parameters with
            the same shapes and dtypes, `base_values` bit for bit at the positions, and the same
            fingerprint. False: only the parameters that the delta changes are looked at, at its
            positions. This is what a model needs that differs elsewhere on purpose: with a new
            head, or with another delta, made on the same base, that shares no coordinate.

        Raises
        ------
        ValueError
            On any other model, and when the delta is applied already. Nothing is written then.

        Notes
        -----
        Cost: k reads and k writes at random; strict: also at most 1024 reads per parameter.
        """
        live.apply_(self, model, strict=strict)

    def revert_(self, model: nn.Module, *, strict: bool = True) -> None:
        """Write `base_values` into the model: the inverse of `apply_`, bit for bit.

        The model must hold `values` at the positions, and (`strict`) be the base model everywhere
        else; of several deltas the last one applied is reverted first. Errors as of `apply_`.
        """
        live.revert_(self, model, strict=strict)

    @contextmanager
    def applied(self, model: nn.Module, *, strict: bool = True) -> Iterator[nn.Module]:
        """Apply inside a ``with`` block and revert at its end, also after an exception."""
        self.apply_(model, strict=strict)
        try:
            yield model
        finally:
            self.revert_(model, strict=strict)

    def to_sparse_patches(self) -> list[dict[str, Any]]:
        """The new values as records that take the place of weights in a running server.

        Returns
        -------
        list of dict
            One for each changed parameter, with the fields of vLLM's ``SparseWeightPatch``:
            ``name`` (of the checkpoint's tensor), ``indices`` (flat, int32; int64 when the
            parameter has 2^31 elements or more, which vLLM does not take), ``values`` (absolute,
            in the weight's dtype), ``full_shape`` (tuple of int). The same pair of tensors is
            what a file of sparse updates in TRL's layout holds under ``<name>.indices`` and
            ``<name>.values``, which are the names in our own file, too.

        Examples
        --------
        >>> patches = [SparseWeightPatch(**patch) for patch in patches]  # doctest: +SKIP
        """
        return [
            {
                "name": name,
                "indices": file.narrow(positions, self.shapes[name]),
                "values": self.values[name],
                "full_shape": self.shapes[name],
            }
            for name, positions in self.indices.items()
        ]

    # ------------------------------------------------------------------------- looking, combining

    def show(self) -> table.Summary:
        """What the delta holds, by parameter: counts, shares, magnitude of the change, bytes.

        Examples
        --------
        >>> print(delta.show())  # doctest: +SKIP
        """
        return table.summary(self)

    def overlap(self, other: Delta) -> algebra.Overlap:
        """Which coordinates both deltas change, and how many of them to different values.

        Deltas of one base that share no coordinate can be applied together, in any order, with
        ``strict=False``.

        Raises
        ------
        ValueError
            When the two are of models with other parameters, shapes or dtypes, with the names.
        """
        return algebra.overlap(self, other)

    def then(self, other: Delta) -> Delta:
        """This delta and then the other one, which was made on what this one leaves, as one.

        Raises
        ------
        ValueError
            When `other` has another parent, or was made on this delta's own base, or has other base
            values at a shared coordinate (with tensors and counts), or is of another model. A delta
            without a parent that shares no coordinate is known by its fingerprint only, a sample.
        """
        return algebra.then(self, other)
