"""The folder of a run: made under a temporary name, put in place when it is complete.

While a run works, its files are in ``<out>.unfinished`` beside ``<out>``; at the end the folder is
renamed. So ``<out>`` is always a complete run, and an earlier one is only given up when its
successor is complete and on disk. A run that was interrupted leaves ``<out>.unfinished`` with all
that is needed to go on.

A process that works in the folder holds a lock on a file in it, which the kernel takes back when
the process ends in whatever way.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from piece_ops._files import is_temporary, sync_folder, sync_tree

UNFINISHED = ".unfinished"
RESULTS, STATE, LOCK = "results.json", "state.json", "lock"
FORMAT, STATE_FORMAT = "piece_ops.run", "piece_ops.run_state"


class OutputError(ValueError):
    """The output folder cannot be used; nothing in it has been changed."""


def is_run(folder: Path) -> bool:
    """Tell whether `folder` holds a run, complete or not, by its results or its state file."""
    return _format(folder / RESULTS) == FORMAT or _format(folder / STATE) == STATE_FORMAT


def _format(path: Path) -> str | None:
    """Return what a JSON file says it is."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(value.get("format")) if isinstance(value, dict) else None


@dataclass(frozen=True)
class TaskFiles:
    """Where the files of one task are, in the folder of its run.

    Attributes
    ----------
    folder : Path
        The run's.
    label : str
        ``<place>-<name>``, the place counted from 1.
    """

    folder: Path
    label: str

    @classmethod
    def of(cls, folder: Path, i: int, name: str) -> TaskFiles:
        """Return the files of task `i`, counted from 0."""
        return cls(folder, f"{i + 1}-{name}")

    def _path(self, kind: str, name: str) -> Path:
        (self.folder / kind).mkdir(exist_ok=True)
        return self.folder / kind / f"{name}.safetensors"

    def selection(self, segment: int) -> Path:
        """Return where a selection is: segment 0 is the task's first, others are refreshed ones."""
        name = f"{self.label}.refresh-{segment}" if segment else self.label
        return self._path("selections", name)

    def selections(self) -> list[Path]:
        """Return the selections that are there, in order."""
        paths = (self.selection(segment) for segment in itertools.count())
        return list(itertools.takewhile(Path.exists, paths))

    def part(self, segment: int) -> Path:
        """Return where the delta of one segment of a task under way is."""
        return self._path("parts", f"{self.label}.{segment}")

    @property
    def delta(self) -> Path:
        """What the task changed."""
        return self._path("deltas", self.label)

    @property
    def checkpoint(self) -> Path:
        """Trained values, optimizer state and position in the data."""
        return self._path("checkpoints", self.label)


class RunFolder:
    """Checks and holds the output folder of one run; a context that holds its lock.

    Parameters
    ----------
    out : Path
        Where the run shall be found in the end. Its parent is made if it is not there.
    overwrite : bool
        Allow a complete run at `out` to be replaced, and an unfinished one beside it to be dropped.
    resume : bool
        Go on with the unfinished run, or find the complete one. Not together with `overwrite`.

    Attributes
    ----------
    out : Path
    work : Path
        ``<out>.unfinished``, where to write.
    is_complete : bool
        With `resume`: there is nothing unfinished, and `out` holds a run.

    Raises
    ------
    OutputError
        If `out` is a file, a folder with something else in it, or a run and neither `overwrite` nor
        `resume` is given; if an unfinished run is in the way, or another process works in it; if
        the parent cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "run")
    >>> with folder:
    ...     _ = (folder.work / "results.json").write_text('{"format": "piece_ops.run"}')
    ...     folder.finish()
    >>> is_run(folder.out)
    True
    """

    def __init__(self, out: Path, overwrite: bool = False, resume: bool = False) -> None:
        if overwrite and resume:
            raise OutputError("output folder: wanted --resume or --overwrite, got both")
        self.out = Path(os.path.abspath(out.expanduser()))
        if not self.out.name:
            raise OutputError(f"output folder: wanted a folder of its own, got {out}")
        self.work = self.out.with_name(self.out.name + UNFINISHED)
        self._old = self.out.with_name(self.out.name + ".replaced")
        self._resume = resume
        self._lock: TextIO | None = None
        self._check_out(overwrite or resume)
        self._check_work(overwrite or resume)
        self._is_begun = self.work.exists()
        self.is_complete = resume and not self._is_begun and is_run(self.out)

    def _check_out(self, allowed: bool) -> None:
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
        if not allowed:
            raise OutputError(
                f"output folder {self.out}: it already holds a run; choose another folder, or "
                "--overwrite to replace it"
            )

    def _check_work(self, allowed: bool) -> None:
        if not self.work.exists():
            return
        # A run that was killed in its first moment has left no more than its lock.
        ours = self.work.is_dir() and (
            is_run(self.work)
            or all(path.name == LOCK or is_temporary(path) for path in self.work.iterdir())
        )
        if not ours:
            raise OutputError(
                f"output folder {self.out}: {self.work} is in the way and is not an unfinished run"
            )
        if not allowed:
            raise OutputError(
                f"output folder {self.out}: an unfinished run is in {self.work} (interrupted, "
                "or still at work); --resume goes on with it, --overwrite drops it"
            )

    def extend(self, write_state: Callable[[Path], object]) -> None:
        """Begin an unfinished run with the files of the complete one, its model and report aside.

        The complete one stays where it is until its successor is complete, too.

        Parameters
        ----------
        write_state : callable
            Gets the new folder, where it writes the state to go on from.

        Raises
        ------
        OutputError
            If the folder cannot be written, or another process has just begun to.
        """
        temporary = self.work.with_name(f".{self.work.name}.{os.getpid()}.tmp")
        not_copied = shutil.ignore_patterns("model", "report*", LOCK, STATE, ".*.tmp")
        try:
            for left in self.work.parent.glob(f".{self.work.name}.*.tmp"):
                shutil.rmtree(left)
            shutil.copytree(self.out, temporary, ignore=not_copied)
            write_state(temporary)
            sync_tree(temporary)
            os.rename(temporary, self.work)
            sync_folder(self.work.parent)
        except OSError as error:
            raise OutputError(
                f"output folder {self.out}: cannot be extended: {error.strerror}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._is_begun, self.is_complete = True, False

    def __enter__(self) -> RunFolder:
        """Make the work folder and lock it; without a run to go on with it is then empty."""
        if self._resume and self._is_begun and not self.work.exists():
            raise self._just_completed()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            keeps = self._resume and (self.work / STATE).exists()
            # Half removed, a run must not look like one to go on with, but still like one: its
            # state goes first, its results last.
            order = {STATE: 0, RESULTS: 2}
            for path in sorted(self.work.rglob("*"), key=lambda path: order.get(path.name, 1)):
                if path.name != LOCK and (is_temporary(path) or not keeps):
                    remove(path)
        except OSError as error:
            self._release()
            raise OutputError(
                f"output folder {self.out}: cannot be written: {error.strerror}"
            ) from error
        return self

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError as error:  # not on Windows, where all that needs no run still works
            raise OutputError(
                f"output folder {self.out}: a run needs the file locks of Linux or macOS, got "
                "Python without fcntl"
            ) from error
        self._lock = (self.work / LOCK).open("a+", encoding="ascii")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            other = self._lock.read().strip()
            self._release()
            raise OutputError(
                f"output folder {self.out}: wanted a run that nobody works on, got one that "
                f"process {other or 'unknown'} is at work on"
            ) from error
        if not _is_file(self._lock, self.work / LOCK):
            self._release()
            raise self._just_completed()
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def _just_completed(self) -> OutputError:
        return OutputError(f"output folder {self.out}: another process has just completed it")

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def finish(self) -> None:
        """Flush the work folder to disk and put it in place, replacing an earlier run."""
        sync_tree(self.work)
        if self.out.exists() and any(self.out.iterdir()):
            if self._old.exists():
                shutil.rmtree(self._old)  # left by a crash before the removal below
            os.rename(self.out, self._old)
        os.rename(self.work, self.out)  # an empty folder at `out` is replaced by the rename itself
        sync_folder(self.out.parent)
        self.tidy()

    def tidy(self) -> None:
        """Remove what is left beside a complete run: the lock, and the run that it replaced."""
        (self.out / LOCK).unlink(missing_ok=True)
        shutil.rmtree(self._old, ignore_errors=True)


def _is_file(stream: TextIO, path: Path) -> bool:
    """Tell whether an open file is the one at `path`, which may have been renamed since."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing happens when it is not there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
