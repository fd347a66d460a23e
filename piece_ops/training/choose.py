"""Choosing the coordinates of a task: its rows, and for piece-g what must be kept."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from piece_ops.importance import Importance, estimate
from piece_ops.selection import Selection
from piece_ops.training.encoding import EncodedRow, Encoder, chunks
from piece_ops.training.settings import Settings
from piece_ops.training.tasks import TaskError, read_rows, split_argument

ROWS_AT_ONCE = 8
"""Rows in one batch of the importance pass; each counts by its own gradient all the same."""


def sample_rows(rows: Sequence[EncodedRow], count: int, seed: int, name: str) -> list[EncodedRow]:
    """Draw at most `count` rows, none twice; the draw depends on the seed and the name only."""
    order = list(range(len(rows)))
    random.Random(f"piece_ops importance {seed} {name}").shuffle(order)
    return [rows[i] for i in order[:count]]


def row_batches(
    encoder: Encoder, rows: Sequence[EncodedRow], device: Any
) -> list[dict[str, Tensor]]:
    """Collate rows into batches for an importance pass."""
    return [encoder.training_batch(group, device) for group in chunks(rows, ROWS_AT_ONCE)]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, or say what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TaskError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path}: wanted UTF-8 text, got bytes that are not ({error.reason})"
        ) from error
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise TaskError(f"{path}: wanted some text, got an empty file")
    return text


class Chooser:
    """Makes the selection of each task.

    Parameters
    ----------
    encoder : Encoder
    settings : Settings
        Its `reference` is read here, so a bad one is found before any work is done.

    Raises
    ------
    TaskError
        If the reference is neither ``"self"`` nor NAME=FILE with rows (``.jsonl``) or text.

    Attributes
    ----------
    reference : list of EncodedRow or None
        The rows of the reference, when it is a file.
    """

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        self._encoder = encoder
        self._settings = settings
        self._statistics: list[Path] = []
        self.reference: list[EncodedRow] | None = None
        if settings.reference != "self":
            self.reference = self._read_reference()

    def _read_reference(self) -> list[EncodedRow]:
        settings, encoder = self._settings, self._encoder
        name, path = split_argument(settings.reference, "--reference")
        if path.suffix == ".jsonl":
            rows = encoder.encode_all(read_rows(path))
        else:
            windows = encoder.text_windows(read_text(path), settings.reference_tokens)
            rows = [EncodedRow(tuple(w[:1]), tuple(w[1:])) for w in windows]
        return sample_rows(rows, settings.reference_rows, settings.seed, name)

    def _references(self, device: Any) -> list[Any]:
        first: Any = "self"
        if self.reference is not None:
            first = row_batches(self._encoder, self.reference, device)
        return [first, *self._statistics]

    def select(
        self,
        model: Any,
        rows: Sequence[EncodedRow],
        name: str,
        place: int,
        show: bool = False,
        *,
        segment: int = 0,
        exclude: Mapping[str, Tensor] | None = None,
    ) -> Selection:
        """Choose the coordinates for one task.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            In evaluation mode; its weights are not changed.
        rows : sequence of EncodedRow
            The task's training rows, of which `importance_rows` are used.
        name : str
            The task's name.
        place : int
            The task's place in the run, from 0: it varies the seed of sampled texts and of
            ``random``.
        show : bool
            Show a progress bar.
        segment : int
            Counts the selections of one task; it varies the seed, too.
        exclude : dict of str to Tensor, optional
            Positions that must not be chosen.

        Returns
        -------
        Selection
        """
        settings = self._settings
        device = next(model.parameters()).device
        sampled = sample_rows(rows, settings.importance_rows, settings.seed, name)
        extra: dict[str, Any] = {
            "embeddings": settings.embeddings,
            "accumulators": settings.accumulators,
            "memory_budget": settings.memory_budget,
            "seed": 1000 * settings.seed + place + 1_000_000 * segment,
            "exclude_positions": exclude,
        }
        if settings.method == "piece-g":
            extra["reference"] = self._references(device)
            extra["reference_samples"] = settings.reference_rows
            extra["reference_tokens"] = settings.reference_tokens
        if settings.method == "piece-s":
            extra["xi"] = settings.xi
        return estimate(
            model,
            row_batches(self._encoder, sampled, device),
            settings.method,
            settings.density,
            progress=show,
            **extra,
        )

    def keep_statistics(
        self, model: Any, rows: Sequence[EncodedRow], name: str, folder: Path
    ) -> Path:
        """Store the square sums of a task just learned, for the selections that follow.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            After training on the task.
        rows : sequence of EncodedRow
            The task's training rows, of which `importance_rows` are used.
        name : str
        folder : Path
            Gets ``NAME.safetensors``, 4 bytes per candidate parameter.

        Returns
        -------
        Path
            The file.
        """
        settings = self._settings
        device = next(model.parameters()).device
        importance = Importance(model, "piece-f", embeddings=settings.embeddings)
        sampled = sample_rows(rows, settings.importance_rows, settings.seed, name)
        for batch in row_batches(self._encoder, sampled, device):
            importance.update(batch)
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.safetensors"
        importance.save(path)
        self.use_statistics(path)
        return path

    def use_statistics(self, path: Path) -> None:
        """Keep away from what stored statistics say is needed, in all selections that follow."""
        self._statistics.append(path)


def shuffled_batches(
    rows: Sequence[EncodedRow], size: int, seed: int, name: str
) -> Iterator[list[EncodedRow]]:
    """Yield batches without end: every pass over the rows has a new order, and none is left out.

    Parameters
    ----------
    rows : sequence of EncodedRow
        Not empty.
    size : int
        Rows a batch; a batch may reach over the end of a pass into the next one.
    seed : int
    name : str
        The task's name; with the seed it decides the order, the same in every method.
    """
    draw = random.Random(f"piece_ops training {seed} {name}")
    waiting: list[int] = []
    while True:
        batch: list[EncodedRow] = []
        while len(batch) < size:
            if not waiting:
                waiting = list(range(len(rows)))
                draw.shuffle(waiting)
            batch.append(rows[waiting.pop()])
        yield batch
