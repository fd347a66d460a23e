"""The rows of a run's matrices: what is measured of the base model and after every task."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from piece_ops.training.benchmarks import lm_eval_scores
from piece_ops.training.encoding import Encoder
from piece_ops.training.measure import Score, Text, evaluate, text_loss
from piece_ops.training.memory import peak_memory
from piece_ops.training.results import ROWS, Results
from piece_ops.training.settings import Settings
from piece_ops.training.state import RunState
from piece_ops.training.tasks import Task


@contextmanager
def metered(seconds: dict[str, float], memory: dict[str, int], phase: str) -> Iterator[None]:
    """Add the wall time of the block to ``seconds[phase]``, keep its most memory likewise."""
    start = time.perf_counter()
    try:
        with peak_memory(memory, phase):
            yield
    finally:
        seconds[phase] = round(seconds.get(phase, 0.0) + time.perf_counter() - start, 2)


def meters_of(results: Results, place: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return where the time and memory of measuring a row are added."""
    if place:
        return results.tasks[place - 1].seconds, results.tasks[place - 1].memory
    return results.base_seconds, results.base_memory


class Rows:
    """Measures a model on tasks and texts, and writes every number into the run's state.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    encoder : Encoder
    tasks : sequence of Task
    texts : sequence of Text
    settings : Settings
    show : bool
        Show progress bars.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        encoder: Encoder,
        tasks: Sequence[Task],
        texts: Sequence[Text],
        settings: Settings,
        show: bool,
    ) -> None:
        self._model, self._tokenizer, self._encoder = model, tokenizer, encoder
        self._tasks, self._texts = tasks, texts
        self._settings, self._show = settings, show

    def measure(self, state: RunState, folder: Path) -> None:
        """Append one row to the matrices: all tasks so far, the next one, and all texts."""
        size = self._settings.eval_batch_size
        results, row, place = state.results, state.row, state.place
        meters = meters_of(state.results, place)
        count = min(place + 1, len(self._tasks)) if place else len(self._tasks)
        for task in self._tasks[len(row["accuracy"]) : count]:
            with metered(*meters, "evaluate"):
                score = self._score(task)
            row["accuracy"].append(score.accuracy)
            row["loss"].append(score.loss)
            state.write(folder)
        for text in self._texts[len(row["general"]) :]:
            with metered(*meters, "general"):
                loss = text_loss(self._model, self._encoder, text, size, self._show)
            row["general"].append(loss)
            state.write(folder)
        if not row["benchmarks"]:
            with metered(*meters, "benchmarks"):
                row["benchmarks"].append(self._benchmarks())
        unmeasured: list[Any] = [None] * (len(self._tasks) - count)
        results.accuracy.append(row["accuracy"] + unmeasured)
        results.loss.append(row["loss"] + unmeasured)
        results.general.append(row["general"])
        results.benchmarks += row["benchmarks"]
        state.row = {name: [] for name in ROWS}

    def measure_appended(self, state: RunState, place: int, folder: Path) -> None:
        """Fill a row that was complete before tasks were appended: the base model's, the last."""
        results = state.results
        count = place + 1 if place else len(self._tasks)
        for j in range(state.place, count):
            if results.accuracy[place][j] is None:
                with metered(*meters_of(state.results, place), "evaluate"):
                    score = self._score(self._tasks[j])
                results.accuracy[place][j], results.loss[place][j] = score.accuracy, score.loss
                state.write(folder)

    def _score(self, task: Task) -> Score:
        return evaluate(
            self._model,
            self._encoder,
            task.held_out,
            self._settings.eval_batch_size,
            self._show,
            metric=task.metric,
            most_tokens=self._settings.max_new_tokens,
        )

    def _benchmarks(self) -> dict[str, float]:
        settings = self._settings
        if not settings.lm_eval:
            return {}
        return lm_eval_scores(
            self._model,
            self._tokenizer,
            settings.lm_eval,
            settings.lm_eval_limit,
            settings.eval_batch_size,
        )
