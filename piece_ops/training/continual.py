"""The continual run: learn tasks one after another and measure what each step gains and costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from piece_ops.training.choose import Chooser, read_text
from piece_ops.training.encoding import EncodedRow, Encoder
from piece_ops.training.measure import Text, evaluate, text_loss
from piece_ops.training.models import load_model, load_tokenizer, save_model
from piece_ops.training.output import RunFolder
from piece_ops.training.results import Results, TaskRecord, TextRecord
from piece_ops.training.settings import Settings
from piece_ops.training.tasks import Task, TaskError
from piece_ops.training.train import train_task


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block to ``seconds[phase]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = round(seconds.get(phase, 0.0) + time.perf_counter() - start, 2)


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


class _Run:
    """One run under way; `run` is its public face."""

    def __init__(
        self,
        source: str,
        tasks: Sequence[tuple[Task, Path]],
        settings: Settings,
        folder: RunFolder,
        texts: Sequence[tuple[str, Path]],
        show: bool,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.folder, self.show, self.say = settings, folder, show, say
        self.tasks = [task for task, _ in tasks]
        self.tokenizer = load_tokenizer(source)
        self.encoder = Encoder(self.tokenizer, settings.prompt_format, settings.max_tokens)
        # Everything that can be wrong with the data is found here, before the model is loaded.
        self.train_rows: list[list[EncodedRow]] = []
        records = []
        for task, path in tasks:
            cut = self.encoder.truncated
            self.train_rows.append(self.encoder.encode_all(task.train))
            self.encoder.encode_all(task.held_out)
            records.append(
                TaskRecord(
                    name=task.name,
                    path=str(path),
                    held_out_split=task.held_out_split,
                    train_rows=len(task.train),
                    held_out_rows=len(task.held_out),
                    truncated_rows=self.encoder.truncated - cut,
                )
            )
        self.texts = load_texts(self.encoder, texts, settings)
        self.chooser = Chooser(self.encoder, settings)
        seconds: dict[str, float] = {}
        with timed(seconds, "load"):
            self.model = load_model(source, dtype=settings.dtype)
        self.results = Results(
            model=source,
            settings=settings,
            parameters=sum(p.numel() for p in self.model.parameters()),
            tasks=records,
            texts=[
                TextRecord(text.name, str(path), sum(len(window) for window in text.windows))
                for text, (_, path) in zip(self.texts, texts, strict=True)
            ],
            base_seconds=seconds,
        )

    def _measure(self, count: int, seconds: dict[str, float]) -> None:
        """Append one row to the matrices: the first `count` tasks and all texts."""
        results, size = self.results, self.settings.eval_batch_size
        accuracy: list[float | None] = [None] * len(self.tasks)
        loss: list[float | None] = [None] * len(self.tasks)
        with timed(seconds, "evaluate"):
            for j, task in enumerate(self.tasks[:count]):
                score = evaluate(self.model, self.encoder, task.held_out, size, self.show)
                accuracy[j], loss[j] = score.accuracy, score.loss
        general: list[float | None] = []
        with timed(seconds, "general"):
            for text in self.texts:
                general.append(text_loss(self.model, self.encoder, text, size, self.show))
        results.accuracy.append(accuracy)
        results.loss.append(loss)
        results.general.append(general)

    def base(self) -> None:
        """Measure the base model on every task and text."""
        self._measure(len(self.tasks), self.results.base_seconds)
        self.results.write(self.folder.work)

    def task(self, i: int) -> None:
        """Select, train and measure task `i`."""
        settings, task, rows = self.settings, self.tasks[i], self.train_rows[i]
        record = self.results.tasks[i]
        selection = None
        if settings.is_sparse:
            with timed(record.seconds, "select"):
                selection = self.chooser.select(self.model, rows, task.name, i, self.show)
                selections = self.folder.work / "selections"
                selections.mkdir(exist_ok=True)
                selection.save(selections / f"{i + 1}-{task.name}.safetensors")
                record.threshold = selection.threshold
        with timed(record.seconds, "train"):
            trained = train_task(
                self.model, self.encoder, rows, task.name, settings, selection, self.show
            )
        record.trained = trained.trained
        record.losses = [round(loss, 5) for loss in trained.losses]
        if settings.keep_statistics and i + 1 < len(self.tasks):
            with timed(record.seconds, "statistics"):
                folder = self.folder.work / "statistics"
                self.chooser.keep_statistics(self.model, rows, task.name, folder)
        self._measure(i + 1, record.seconds)
        self.results.write(self.folder.work)
        self.say(self._line(i))

    def _line(self, i: int) -> str:
        """Say in one line what a task brought."""
        results = self.results
        before, after = results.accuracy[0][i], results.accuracy[i + 1][i]
        record = results.tasks[i]
        seconds = sum(record.seconds.values())
        return (
            f"task {i + 1} of {len(self.tasks)}, {record.name}: {100 * (before or 0):.0f} % right "
            f"before, {100 * (after or 0):.0f} % after ({record.trained:,} parameters trained, "
            f"{seconds:.0f} s)"
        )


def run(
    source: str,
    tasks: Sequence[tuple[Task, Path]],
    settings: Settings,
    out: Path,
    *,
    texts: Sequence[tuple[str, Path]] = (),
    overwrite: bool = False,
    save: bool = True,
    show: bool = False,
    say: Callable[[str], None] = print,
) -> Results:
    """Learn tasks one after another, each with its own selection and its own optimizer state.

    For each task: importance from its training rows, selection, training, then the held-out rows of
    all tasks so far and the general texts. ``results.json`` is written after the base model and
    after every task.

    Parameters
    ----------
    source : str
        Model folder or hub id.
    tasks : sequence of (Task, Path)
        In the order of learning, with the path each was read from (for the record).
    settings : Settings
    out : Path
        Folder of the run: ``results.json``, ``model/`` (a normal Hugging Face folder),
        ``selections/``, and with `keep_statistics` ``statistics/``. Until the run is complete all
        this is in ``<out>.unfinished``.
    texts : sequence of (name, path)
        General texts for perplexity.
    overwrite : bool
        Replace a run that is already there, once this one is complete.
    save : bool
        Save the trained model.
    show : bool
        Show progress bars (on a terminal).
    say : callable
        Gets one line after every task.

    Returns
    -------
    Results

    Raises
    ------
    TaskError, ModelError, OutputError
        For bad tasks, a model that cannot be loaded, an output folder that cannot be used.
    TrainingError
        If a loss is not finite.

    Examples
    --------
    >>> task = load_task("zones", Path("zones.jsonl"))  # doctest: +SKIP
    >>> tasks = [(task, Path("zones.jsonl"))]  # doctest: +SKIP
    >>> run("./model", tasks, Settings(steps=40), Path("out"))  # doctest: +SKIP
    """
    if not tasks:
        raise TaskError("piece_ops.run: wanted at least one task, got none")
    check_names([task.name for task, _ in tasks], "task")
    folder = RunFolder(out, overwrite)
    work = _Run(source, tasks, settings, folder, texts, show, say)
    folder.start()
    for record in work.results.tasks:
        if record.truncated_rows:
            say(
                f"task {record.name}: {record.truncated_rows} rows are longer than "
                f"{settings.max_tokens} tokens; the start of their prompts is cut off"
            )
    work.base()
    for i in range(len(tasks)):
        work.task(i)
    if save:
        with timed(work.results.base_seconds, "save"):
            save_model(work.model, work.tokenizer, folder.work / "model")
    work.results.complete = True
    work.results.write(folder.work)
    folder.finish()
    return work.results
