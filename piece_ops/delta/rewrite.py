"""Deltas and model folders: the files are copied, patched at the coordinates and renamed.

Nothing is loaded as a model and nothing is re-encoded: a file keeps its header and every byte that
the delta does not change. All new files lie complete on the disk before the first one takes its
place. Where there are several, the index goes by another name meanwhile: a folder in which a crash
has left old and new files side by side cannot be loaded, and the next call with the same delta,
whose digest is in that other name, ends the work.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from piece_ops._files import sync_folder
from piece_ops.delta import live
from piece_ops.delta.bits import bits, same_bits
from piece_ops.delta.folder import Folder, mark
from piece_ops.delta.record import Delta

# Weights in other formats, which would not be changed and so must not travel to another folder.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def rewrite(
    delta: Delta,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    revert: bool = False,
    strict: bool = True,
) -> int:
    """Apply a delta to the safetensors files of a model folder, or revert it.

    Parameters
    ----------
    delta : Delta
    folder : path
        A model folder (one file, or several with an index) or one safetensors file.
    out : path, optional
        A folder (or file) that does not exist: the changed model goes there, with everything else
        that the folder holds but weights in other formats. By default the folder itself is changed.
    revert : bool
        Write the base values instead of the changed ones.
    strict : bool
        As of `Delta.apply_`.

    Returns
    -------
    int
        How many files were changed.

    Raises
    ------
    ValueError, OSError
        As of `Delta.apply_`, and when files are damaged or missing. Nothing is changed then.

    Notes
    -----
    Cost: the files that hold changed tensors are read and written once, on the disk only; in place
    they need their own size of free space for the time of the call.
    """
    where = f"piece_ops.delta.{'revert' if revert else 'apply'}"
    source = Folder(folder, where)
    todo = _check(delta, source, revert, strict, where)
    if out is not None:
        if source.unfinished:
            raise ValueError(
                f"{where}: {str(folder)!r} holds the files of an interrupted apply or revert; call "
                "it again in place first"
            )
        _rewrite_elsewhere(delta, source, Path(out), todo, revert, where)
    else:
        _rewrite_in_place(delta, source, todo, revert)
    return len(todo)


def _check(delta: Delta, source: Folder, revert: bool, strict: bool, where: str) -> list[Path]:
    """Raise unless the files may be changed; which of them must be."""
    if source.unfinished and source.unfinished != delta.digest:
        raise ValueError(
            f"{where}: {str(source.path)!r} holds the files of an interrupted apply or revert of "
            f"the delta {source.unfinished[:12]}, which must be called again first, got the delta "
            f"{delta.digest[:12]}. Nothing was written"
        )
    live.check_structure(delta, source, strict, where)
    old, new = delta.base_values, delta.values
    if revert:
        old, new = new, old
    todo = []
    for file in sorted({source.files[name] for name in delta.indices}):
        names = [name for name in delta.indices if source.files[name] == file]
        held = live.read({n: source[n] for n in names}, {n: delta.indices[n] for n in names})
        # After a crash a file may have been replaced already.
        if not (source.unfinished and same_bits(held, {name: new[name] for name in names})):
            live.check_held(delta, held, old, new, where)
            todo.append(file)
    if strict:
        live.check_fingerprint(delta, source, delta.base_values, where)
    return todo


def _rewrite_in_place(delta: Delta, source: Folder, todo: list[Path], revert: bool) -> None:
    temporaries = {file: file.with_name(f".{file.name}.delta.tmp") for file in todo}
    try:
        for file, temporary in temporaries.items():
            _patch_copy(delta, source, file, temporary, revert)
        several = source.index is not None and len(set(source.files.values())) > 1
        index = source.index if several else None
        if index is not None and not source.unfinished:
            aside = index.with_name(index.name + mark(delta.digest))
            os.rename(index, aside)
            sync_folder(index.parent)
            index = aside
        for file, temporary in temporaries.items():
            os.replace(temporary, file)
        sync_folder(source.path if source.path.is_dir() else source.path.parent)
        if index is not None:
            os.rename(index, index.with_name(index.name.removesuffix(mark(delta.digest))))
            sync_folder(index.parent)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _rewrite_elsewhere(
    delta: Delta, source: Folder, out: Path, todo: Iterable[Path], revert: bool, where: str
) -> None:
    if out.exists():
        raise ValueError(f"{where}: the output must not exist yet, got {str(out)!r}")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if source.path.is_file():
            _patch_copy(delta, source, source.path, work, revert)
        else:
            changed = {file.name for file in todo}
            shutil.copytree(
                source.path,
                work,
                ignore=lambda _folder, names: [
                    name for name in names if name in changed or name.endswith(_OTHER_WEIGHTS)
                ],
            )
            for file in todo:
                _patch_copy(delta, source, file, work / file.name, revert)
            sync_folder(work)
        os.rename(work, out)
        sync_folder(out.parent)
    finally:
        if work.is_dir():
            shutil.rmtree(work)
        work.unlink(missing_ok=True)


def _patch_copy(delta: Delta, source: Folder, file: Path, copy: Path, revert: bool) -> None:
    """Copy one safetensors file and write the delta's values into the copy."""
    shutil.copy(file, copy)
    with open(copy, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        for name, values in (delta.base_values if revert else delta.values).items():
            if source.files[name] != file:
                continue
            integers = bits(values.cpu()).numpy()
            begin, end = header[name]["data_offsets"]
            tensor = np.memmap(
                opened,
                integers.dtype,
                "r+",
                offset=8 + size + begin,
                shape=((end - begin) // integers.itemsize,),
            )
            tensor[delta.indices[name].cpu().numpy()] = integers
            tensor.flush()
        os.fsync(opened.fileno())
