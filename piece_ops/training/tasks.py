"""Tasks: rows of a prompt and its answer, read from JSONL files, split into train and held out.

A task is written NAME=PATH. PATH is one of

* a folder with ``train.jsonl`` and, if there are any, ``eval.jsonl`` and ``test.jsonl``;
* one ``.jsonl`` file. Its rows are then split: they are shuffled with the run's seed, and of n rows
  max(1, min(100, n // 5)) are held out (the ``test`` rows), the rest is for training. The split
  depends only on the seed, the task's name and the number of rows.

Each line of a file is one JSON object with at least the keys ``prompt`` and ``answer``, both
non-empty strings; other keys are ignored, empty lines are skipped.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from piece_ops.training.metrics import check_metric

HELD_OUT_SHARE = 5
"""One row in this many is held out of a single file."""

HELD_OUT_MOST = 100
"""And at most this many: a standard error of 5 points of accuracy, at a small cost."""


class TaskError(ValueError):
    """A task cannot be read; the text says which file and line, what was wanted, what was found."""


@dataclass(frozen=True)
class Row:
    """One sample: the model reads `prompt` and shall write `answer`."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One task of the run.

    Attributes
    ----------
    name : str
        Its name in tables and files: letters, digits, ``.``, ``_`` and ``-``.
    train : tuple of Row
        What it is learned from, never empty.
    held_out : tuple of Row
        What it is measured on; never trained on, never empty.
    held_out_split : str
        Which rows these are: ``"test"`` or ``"eval"``.
    metric : str
        How answers are scored, one of `METRICS`.
    """

    name: str
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    held_out_split: str
    metric: str = "exact"


def split_argument(argument: str, option: str) -> tuple[str, Path]:
    """Take ``NAME=PATH`` apart.

    Parameters
    ----------
    argument : str
        What the user wrote.
    option : str
        The option it was written for, for the error text.

    Returns
    -------
    (str, Path)
        The name and the path.

    Raises
    ------
    TaskError
        If there is no ``=``, no path, or the name has other characters than letters, digits, ``.``,
        ``_``, ``-``.

    Examples
    --------
    >>> split_argument("zones=data/zones.jsonl", "--task")
    ('zones', PosixPath('data/zones.jsonl'))
    """
    name, path = split_pair(argument, option, "PATH")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise TaskError(
            f"{option}: a name is made of letters, digits, '.', '_' and '-', got {name!r} in "
            f"{argument!r}"
        )
    return name, Path(path).expanduser()


def split_pair(argument: str, option: str, wanted: str = "METRIC") -> tuple[str, str]:
    """Take ``NAME=VALUE`` apart; TaskError when one of them is missing."""
    name, equals, value = argument.partition("=")
    if not equals or not value:
        raise TaskError(f"{option}: wanted NAME={wanted}, got {argument!r}")
    return name, value


def read_rows(path: Path) -> list[Row]:
    """Read one JSONL file.

    Parameters
    ----------
    path : Path
        The file, UTF-8, one JSON object a line.

    Returns
    -------
    list of Row
        Its rows in file order, at least one.

    Raises
    ------
    TaskError
        If the file is not there, cannot be read, is empty, or holds a bad line (named by its
        number, from 1).
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    rows.append(_read_row(line, f"{path}, line {number}"))
    except FileNotFoundError as error:
        raise TaskError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path}: wanted UTF-8 text, got bytes that are not ({error.reason})"
        ) from error
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    if not rows:
        raise TaskError(f"{path}: wanted at least one row, got an empty file")
    return rows


def _read_row(line: str, where: str) -> Row:
    """Check one line and make a `Row` of it."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{where}: wanted one JSON object, got {_short(line)} ({error.msg})"
        ) from error
    if not isinstance(value, dict):
        raise TaskError(
            f'{where}: wanted an object {{"prompt": ..., "answer": ...}}, got {_short(line)}'
        )
    for key in ("prompt", "answer"):
        if key not in value:
            found = ", ".join(repr(k) for k in value) or "no keys"
            raise TaskError(f"{where}: wanted the keys 'prompt' and 'answer', got {found}")
        if not isinstance(value[key], str):
            kind = type(value[key]).__name__
            raise TaskError(
                f"{where}: {key!r} must be a string, got {kind} {_short(repr(value[key]))}"
            )
        if not value[key].strip():
            raise TaskError(f"{where}: {key!r} must not be empty, got {value[key]!r}")
    return Row(value["prompt"], value["answer"])


def _short(text: str, most: int = 60) -> str:
    """Cut `text` for an error line."""
    text = text.strip()
    return text if len(text) <= most else text[: most - 3] + "..."


def load_task(
    name: str,
    path: Path,
    *,
    seed: int = 0,
    prefer: str = "test",
    metric: str = "exact",
    train_rows: int | None = None,
    held_out_rows: int | None = None,
) -> Task:
    """Read a task from a file or a folder; see the top of this module for the rules.

    Parameters
    ----------
    name : str
        The task's name.
    path : Path
        A ``.jsonl`` file or a folder that holds ``train.jsonl``.
    seed : int
        Decides how a single file is split.
    prefer : {"test", "eval"}
        Which file of a folder is measured on when both are there; with one of them, that one. A
        folder with neither is split like a single file. Choose settings on ``"eval"`` and report on
        ``"test"``.
    metric : str
        How answers are scored, one of `METRICS`.
    train_rows, held_out_rows : int, optional
        Use no more than so many, the first ones; by default all.

    Returns
    -------
    Task

    Raises
    ------
    TaskError
        If something is missing, empty or malformed.
    ValueError, ModuleNotFoundError
        For an unknown metric, or one whose package is not installed.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "add.jsonl"
    >>> _ = file.write_text(2 * '{"prompt": "1+1=", "answer": "2"}\\n')
    >>> task = load_task("add", file)
    >>> len(task.train), len(task.held_out)
    (1, 1)
    """
    check_metric(metric, f"task {name}")
    task = _load(name, path, seed, prefer)
    return replace(
        task,
        train=task.train[:train_rows],
        held_out=task.held_out[:held_out_rows],
        metric=metric,
    )


def _load(name: str, path: Path, seed: int, prefer: str) -> Task:
    if prefer not in ("test", "eval"):
        raise TaskError(f"task {name}: prefer must be 'test' or 'eval', got {prefer!r}")
    if not path.exists():
        raise TaskError(f"task {name}: there is no file or folder {path}")
    if not path.is_dir():
        return _split(name, path, read_rows(path), seed)
    if not (path / "train.jsonl").exists():
        raise TaskError(
            f"task {name}: the folder {path} must hold train.jsonl, got {_listing(path)}"
        )
    train = read_rows(path / "train.jsonl")
    for split in (prefer, "eval" if prefer == "test" else "test"):
        if (path / f"{split}.jsonl").exists():
            return Task(name, tuple(train), tuple(read_rows(path / f"{split}.jsonl")), split)
    return _split(name, path / "train.jsonl", train, seed)


def _split(name: str, path: Path, rows: list[Row], seed: int) -> Task:
    """Hold out part of the rows of a single file."""
    if len(rows) < 2:
        raise TaskError(
            f"{path}: wanted at least 2 rows, one to train on and one to hold out, got 1"
        )
    # A string seed is hashed by its text, so the split is the same in every Python version and
    # process.
    order = list(range(len(rows)))
    random.Random(f"piece_ops split {seed} {name}").shuffle(order)
    count = max(1, min(HELD_OUT_MOST, len(rows) // HELD_OUT_SHARE))
    held_out, train = sorted(order[:count]), sorted(order[count:])
    return Task(name, tuple(rows[i] for i in train), tuple(rows[i] for i in held_out), "test")


def _listing(folder: Path) -> str:
    """Name a few entries of `folder` for an error line."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "an empty folder"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
