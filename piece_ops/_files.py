"""Files written whole or not at all, and files of tensors read with clear errors.

A file is written beside its destination under a temporary name, flushed to the disk and renamed, so
a reader never sees half a file and an interrupted run leaves the old one. Files of tensors are
safetensors; their metadata holds three strings: ``format`` (what it is), ``version`` and ``info``
(JSON).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, flush it to the disk, rename it to `path`.

    Raises
    ------
    OSError
        If the folder cannot be written; what was at `path` is then untouched.
    """
    final = Path(path)
    temporary = _temporary(final)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(final.parent)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder under a temporary name, flush it to the disk, rename it to `path`.

    A folder that is at `path` is removed just before.
    """
    temporary = _temporary(path)
    try:
        write(temporary)
        sync_tree(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Tell a name under which something is being written; a killed process leaves it behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the entries of `folder` (names made or renamed in it) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; the folder must exist."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, atomically; the folder must exist."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    file_format: str,
    version: int,
    info: Mapping[str, Any],
) -> None:
    """Write `tensors` and `info` to `path` atomically; parent directories must exist."""
    header = {
        "format": file_format,
        "version": str(version),
        "info": json.dumps(info, separators=(",", ":")),
    }

    def write(temporary: Path) -> None:
        try:
            save_file(dict(tensors), temporary, metadata=header)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{path} cannot be written: {error}") from error

    write_atomically(path, write)


def read_tensors(
    path: str | os.PathLike[str],
    *,
    file_format: str,
    version: int,
    where: str,
    older: Sequence[int] = (),
) -> tuple[dict[str, Any], list[str], Callable[..., torch.Tensor], int]:
    """Open a file of `write_tensors`: info, names, a reader for one tensor, and the version.

    Tensors are read one by one (each a copy of its own), or some rows of one, so a large file never
    has to be held twice. Files of the `older` versions are opened, too. Raises FileNotFoundError,
    or ValueError when the file is not what it should be.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: wanted a file, got {str(path)!r}, which is not one")
    handle: Any
    try:
        handle = safe_open(path, framework="pt")
        header = handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{where}: {str(path)!r} is not a whole safetensors file (truncated, or another "
            f"format): {error}"
        ) from error
    if header.get("format") != file_format:
        raise ValueError(
            f"{where}: {str(path)!r} must hold {file_format!r}, got {header.get('format')!r}"
        )
    if header.get("version") not in {str(known) for known in (version, *older)}:
        raise ValueError(
            f"{where}: {str(path)!r} must have format version {version}, got "
            f"{header.get('version')!r}; it was written by another release of piece_ops"
        )
    try:
        info = json.loads(header["info"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: the header of {str(path)!r} cannot be read: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{where}: the header of {str(path)!r} must be a JSON object")

    def read(name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        tensor: torch.Tensor = (
            handle.get_tensor(name) if rows is None else handle.get_slice(name)[slice(*rows)]
        )
        return tensor.clone()

    return info, list(handle.keys()), read, int(header["version"])
