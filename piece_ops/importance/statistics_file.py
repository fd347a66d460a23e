"""Statistics on disk: one safetensors file, tensors named ``<kind>/<parameter>``."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from piece_ops._files import read_tensors, write_tensors
from piece_ops.importance.candidates import Candidates
from piece_ops.importance.scores import NEEDS
from piece_ops.importance.statistics import DTYPES, Statistics

_FORMAT, _VERSION = "piece_ops.importance", 1
_KINDS = ("sums", "square_sums", "reference", "kept")  # attributes of Statistics, less the "_"
_SETTINGS = ("method", "per_sample", "xi", "compat", "seed")


def write_statistics(
    path: str | os.PathLike[str], statistics: Statistics, settings: dict[str, Any]
) -> None:
    """Write accumulators, counts and settings, atomically."""
    tensors = {
        f"{kind}/{name}": tensor.to("cpu")
        for kind in _KINDS
        for name, tensor in getattr(statistics, f"_{kind}").items()
    }
    info = {
        **settings,
        "samples": statistics._samples,
        "reference_samples": statistics._reference_samples,
        "shapes": {n: list(p.shape) for n, p in statistics._candidates.parameters.items()},
    }
    write_tensors(path, tensors, file_format=_FORMAT, version=_VERSION, info=info)


class StatisticsFile:
    """A file of `write_statistics`, checked against a model; `fill` reads (some of) its tensors."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        where: str,
        only: Candidates | None = None,
    ) -> None:
        info, stored, self._read, _ = read_tensors(
            path, file_format=_FORMAT, version=_VERSION, where=where
        )
        self._path, self._where, self._stored = str(path), where, set(stored)
        try:
            shapes = {str(n): tuple(s) for n, s in info["shapes"].items()}
            self.settings = {key: info[key] for key in _SETTINGS}
            self.settings["accumulators"] = info.get("accumulators", "float32")
            self._dtype = DTYPES[self.settings["accumulators"]]
            self._counts = int(info["samples"]), int(info["reference_samples"])
            NEEDS[self.settings["method"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{where}: the header of {self._path!r} is incomplete: {error!r}"
            ) from error
        found = dict(model.named_parameters())
        unfit = [
            f"{n!r} {list(s)} (model: {list(found[n].shape) if n in found else 'none'})"
            for n, s in shapes.items()
            if n not in found or tuple(found[n].shape) != s
        ]
        if unfit:
            raise ValueError(
                f"{where}: the statistics must fit the model, got {len(unfit)} of {len(shapes)} "
                f"parameters that do not: {'; '.join(unfit[:5])}"
            )
        official = self.settings["compat"] is not None
        counted = [p for p in found.values() if p.requires_grad or not official]
        self.candidates = Candidates(
            {name: found[name] for name in shapes if only is None or name in only.parameters},
            sum(p.numel() for p in counted),
            {} if only is None else only.rows,
        )

    def fill(self, statistics: Statistics) -> None:
        """Read every accumulator of the file into `statistics`, on its parameter's device."""
        statistics._samples, statistics._reference_samples = self._counts
        for kind in _KINDS:
            keys = {name: f"{kind}/{name}" for name in self.candidates.parameters}
            present = self._stored & set(keys.values())
            if not present:
                continue
            if len(present) < len(keys):
                raise ValueError(
                    f"{self._where}: {self._path!r} is damaged: {kind} must have {len(keys)} "
                    f"tensors, got {len(present)}"
                )
            held = {}
            for name, parameter in self.candidates.parameters.items():
                tensor = self._read(keys[name], self.candidates.rows.get(name))
                shape = self.candidates.shape(name)
                if tensor.dtype != self._dtype or tensor.shape != shape:
                    raise ValueError(
                        f"{self._where}: {self._path!r} is damaged: {kind} of {name!r} must be "
                        f"{self._dtype} {list(shape)}, got {tensor.dtype} "
                        f"{list(tensor.shape)}"
                    )
                held[name] = tensor.to(parameter.device)
            setattr(statistics, f"_{kind}", held)
