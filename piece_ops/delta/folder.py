"""The weights of a model folder: safetensors files, read tensor by tensor, never all at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNFINISHED = ".unfinished"


def mark(digest: str) -> str:
    """What an index's name ends with while a delta of this digest is written."""
    return f".{digest}{UNFINISHED}"


class Folder(Mapping[str, Tensor]):
    """Tensor by name, mapped from the disk when asked for; from a folder or one safetensors file.

    A folder holds ``model.safetensors.index.json`` and the files it names, or
    ``model.safetensors``, or one other index or file of that kind.

    Attributes
    ----------
    index : Path or None
        The index file; while `unfinished` under its other name, see `mark`.
    files : dict of str to Path
        Tensor name -> file.
    unfinished : str
        Digest of the delta whose `rewrite` of the files was interrupted; empty: none was.

    Raises
    ------
    FileNotFoundError, ValueError
        When there are no weights, or files that do not hold what the index says.
    """

    def __init__(self, path: str | os.PathLike[str], where: str) -> None:
        self.path, self._where = Path(path), where
        self.unfinished = ""
        self.index, single = self._find()
        self._open: dict[Path, Any] = {}
        self.files: dict[str, Path] = {}
        if self.index is None:
            self.files = dict.fromkeys(self._handle(single).keys(), single)
            return
        for name, file in self._weight_map(self.index).items():
            shard = self.index.parent / file
            if shard.parent != self.index.parent:
                raise ValueError(
                    f"{where}: files must lie beside {str(self.index)!r}, got {file!r}"
                )
            self.files[name] = shard
        for shard in dict.fromkeys(self.files.values()):
            missing = [n for n, s in self.files.items() if s == shard]
            missing = sorted(set(missing) - set(self._handle(shard).keys()))
            if missing:
                raise ValueError(
                    f"{where}: {str(shard)!r} must hold what {self.index.name!r} says, got "
                    f"{len(missing)} tensors that it lacks: {missing[:5]}"
                )

    def _find(self) -> tuple[Path | None, Path]:
        """The index, or else the one file."""
        if self.path.is_file():
            return None, self.path
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self._where}: wanted a model folder or a safetensors file, got "
                f"{str(self.path)!r}, which is neither"
            )
        for pattern in (INDEX, f"*{INDEX.removeprefix('model')}"):
            for ending in ("", mark("*")):
                found = sorted(self.path.glob(pattern + ending))
                if len(found) == 1:
                    if ending:
                        self.unfinished = found[0].name.removesuffix(UNFINISHED).rpartition(".")[2]
                    return found[0], found[0]
        for pattern in (SINGLE, "*.safetensors"):
            found = sorted(self.path.glob(pattern))
            if len(found) == 1:
                return None, found[0]
        raise FileNotFoundError(
            f"{self._where}: {str(self.path)!r} must hold {SINGLE}, or {INDEX} and its files, got "
            f"{[entry.name for entry in found] or 'no safetensors file'}"
        )

    def _weight_map(self, index: Path) -> dict[str, str]:
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in found.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self._where}: {str(index)!r} must be an index of safetensors files: {error!r}"
            ) from error

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{self._where}: {str(file)!r} is not a whole safetensors file (truncated, or "
                    f"another format): {error}"
                ) from error
        return self._open[file]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._handle(self.files[name]).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
