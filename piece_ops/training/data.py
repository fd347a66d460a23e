"""The data of a run: tasks and texts as token ids, and what tells them from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from piece_ops.training.choose import read_text
from piece_ops.training.encoding import EncodedRow, Encoder
from piece_ops.training.measure import Text
from piece_ops.training.models import load_tokenizer
from piece_ops.training.results import TaskRecord, TextRecord
from piece_ops.training.settings import Settings
from piece_ops.training.tasks import Task, TaskError


class Data:
    """Tasks and general texts, encoded.

    Parameters
    ----------
    source : str
        Model folder or hub id, for its tokenizer.
    tasks : sequence of (Task, Path)
    settings : Settings
    texts : sequence of (name, path)

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    encoder : Encoder
    tasks : list of Task
    train_rows : list of list of EncodedRow
        Of every task.
    texts : list of Text
    task_records, text_records : list
        For the results file.
    """

    def __init__(
        self,
        source: str,
        tasks: Sequence[tuple[Task, Path]],
        settings: Settings,
        texts: Sequence[tuple[str, Path]],
    ) -> None:
        self.tokenizer = load_tokenizer(source)
        self.encoder = make_encoder(self.tokenizer, settings)
        self.tasks = [task for task, _ in tasks]
        self.train_rows: list[list[EncodedRow]] = []
        self._held_out: list[list[EncodedRow]] = []
        self.task_records = []
        for task, path in tasks:
            truncated, cut = self.encoder.truncated, self.encoder.cut_answers
            self.train_rows.append(self.encoder.encode_all(task.train))
            self._held_out.append(self.encoder.encode_all(task.held_out))
            self.task_records.append(
                TaskRecord(
                    name=task.name,
                    path=str(path),
                    held_out_split=task.held_out_split,
                    train_rows=len(task.train),
                    held_out_rows=len(task.held_out),
                    truncated_rows=self.encoder.truncated - truncated,
                    cut_answers=self.encoder.cut_answers - cut,
                    metric=task.metric,
                )
            )
        self.texts = load_texts(self.encoder, texts, settings)
        self.text_records = [
            TextRecord(text.name, str(path), sum(len(window) for window in text.windows))
            for text, (_, path) in zip(self.texts, texts, strict=True)
        ]

    def identity(
        self, settings: Settings, reference: Sequence[EncodedRow] | None, base: str
    ) -> dict[str, Any]:
        """Describe the run by everything that decides its numbers; contents count, not files.

        Parameters
        ----------
        settings : Settings
        reference : sequence of EncodedRow, optional
            What piece-g must keep, when it comes from a file.
        base : str
            Fingerprint of the base model.
        """
        return {
            "task names": ", ".join(task.name for task in self.tasks),
            "task metric": {task.name: task.metric for task in self.tasks},
            "task content": {task.name: digest(_rows(task)) for task in self.tasks},
            "general text content": {text.name: digest(text.windows) for text in self.texts},
            "reference content": None if reference is None else digest(_ids(reference)),
            # The name of a reference decides the draw of its rows; where its file lies does not.
            "setting": {**settings.as_dict(), "reference": settings.reference.split("=")[0]},
            # These stand for the tokenizer.
            "tokens of task": {
                task.name: digest(ids for rows in sides for ids in _ids(rows))
                for task, *sides in zip(self.tasks, self.train_rows, self._held_out, strict=True)
            },
            "base model": base,
        }


def make_encoder(tokenizer: Any, settings: Settings) -> Encoder:
    """Make the encoder that the settings ask for."""
    return Encoder(
        tokenizer, settings.prompt_format, settings.max_tokens, settings.max_answer_tokens
    )


def _rows(task: Task) -> Iterator[Any]:
    for side in ("train", "held_out"):
        for row in getattr(task, side):
            yield side, row.prompt, row.answer


def _ids(rows: Iterable[EncodedRow]) -> Iterator[Any]:
    for row in rows:
        yield row.prompt, row.answer


def digest(values: Iterable[Any]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the values' JSON lines."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(json.dumps(value).encode() + b"\n")
    return sha.hexdigest()[:16]


def load_texts(
    encoder: Encoder, files: Sequence[tuple[str, Path]], settings: Settings
) -> list[Text]:
    """Read the general texts and cut them into windows.

    Parameters
    ----------
    encoder : Encoder
    files : sequence of (name, path)
    settings : Settings
        `window` and `general_tokens` are used.

    Returns
    -------
    list of Text

    Raises
    ------
    TaskError
        If a file is missing, empty, not UTF-8, or a name is given twice.
    """
    check_names([name for name, _ in files], "general text")
    texts = []
    for name, path in files:
        windows = encoder.text_windows(read_text(path), settings.window, settings.general_tokens)
        texts.append(Text(name, tuple(tuple(window) for window in windows)))
    return texts


def check_names(names: Sequence[str], what: str) -> None:
    """Raise TaskError when a name occurs twice."""
    for name in names:
        if names.count(name) > 1:
            raise TaskError(f"every {what} must have a name of its own, got {name!r} twice")
