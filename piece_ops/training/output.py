"""The folder of a run: made under a temporary name, put in place when it is complete.

While a run works, its files are in ``<out>.unfinished`` beside ``<out>``; at the end the folder is
renamed. So ``<out>`` is always a complete run, and an earlier one is only given up when its
successor is complete and on disk. A run that was interrupted leaves ``<out>.unfinished`` with the
results so far.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from piece_ops._files import sync_folder

RESULTS = "results.json"
FORMAT = "piece_ops.run"


class OutputError(ValueError):
    """The output folder cannot be used; nothing in it has been changed."""


def is_run(folder: Path) -> bool:
    """Tell whether `folder` holds a run, complete or not, by its results file."""
    try:
        value = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


class RunFolder:
    """Checks and holds the output folder of one run.

    Parameters
    ----------
    out : Path
        Where the run shall be found in the end. Its parent is made if it is not there.
    overwrite : bool
        Allow a complete run at `out` to be replaced, and an unfinished one beside it to be dropped.

    Attributes
    ----------
    out : Path
    work : Path
        ``<out>.unfinished``, where to write.

    Raises
    ------
    OutputError
        If `out` is a file, a folder with something else in it, or a run and `overwrite` is not
        given; if an unfinished run is in the way; if the parent cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "run", overwrite=False)
    >>> folder.start()
    >>> _ = (folder.work / "results.json").write_text('{"format": "piece_ops.run"}')
    >>> folder.finish()
    >>> is_run(folder.out)
    True
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out.expanduser()))
        if not self.out.name:
            raise OutputError(f"output folder: wanted a folder of its own, got {out}")
        self.work = self.out.with_name(self.out.name + ".unfinished")
        self._check_out(overwrite)
        self._check_work(overwrite)

    def _check_out(self, overwrite: bool) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise OutputError(f"output folder {self.out}: wanted a folder, got a file of that name")
        if not any(self.out.iterdir()):
            return
        if not is_run(self.out):
            raise OutputError(
                f"output folder {self.out}: wanted a new or empty folder, got one that "
                "holds other files (they are never overwritten)"
            )
        if not overwrite:
            raise OutputError(
                f"output folder {self.out}: it already holds a run; choose another folder, or "
                "--overwrite to replace it"
            )

    def _check_work(self, overwrite: bool) -> None:
        if not self.work.exists():
            return
        ours = self.work.is_dir() and (is_run(self.work) or not any(self.work.iterdir()))
        if not ours:
            raise OutputError(
                f"output folder {self.out}: {self.work} is in the way and is not an unfinished run"
            )
        if not overwrite:
            raise OutputError(
                f"output folder {self.out}: an unfinished run is in {self.work} (interrupted, "
                "or still at work); remove it, or use --overwrite to drop it"
            )

    def start(self) -> None:
        """Make the work folder, empty."""
        try:
            if self.work.exists():
                shutil.rmtree(self.work)
            self.work.mkdir(parents=True)
        except OSError as error:
            raise OutputError(
                f"output folder {self.out}: cannot be written: {error.strerror}"
            ) from error

    def finish(self) -> None:
        """Flush the work folder to disk and put it in place, replacing an earlier run."""
        for path in self.work.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
            elif path.is_dir():
                sync_folder(path)
        sync_folder(self.work)
        old = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists() and any(self.out.iterdir()):
            if old.exists():
                shutil.rmtree(old)  # left by a crash between the two renames and the removal below
            os.rename(self.out, old)
        os.rename(self.work, self.out)  # an empty folder at `out` is replaced by the rename itself
        sync_folder(self.out.parent)
        if old.exists():
            shutil.rmtree(old)
