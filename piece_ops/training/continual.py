"""The continual run: learn tasks one after another and measure what each step gains and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from piece_ops.training.checkpoint import CHECKPOINT_SECONDS
from piece_ops.training.data import check_names
from piece_ops.training.output import STATE, RunFolder
from piece_ops.training.results import Results
from piece_ops.training.settings import Settings
from piece_ops.training.state import RunState
from piece_ops.training.tasks import Task, TaskError
from piece_ops.training.work import Work


def run(
    source: str,
    tasks: Sequence[tuple[Task, Path]],
    settings: Settings,
    out: Path,
    *,
    texts: Sequence[tuple[str, Path]] = (),
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    save: bool = True,
    report: bool = True,
    show: bool = False,
    say: Callable[[str], None] = print,
) -> Results:
    """Learn tasks one after another, each with its own selection and its own optimizer state.

    For each task: importance from its training rows, selection, training, then the held-out rows of
    all tasks so far, of the next one, and the general texts.

    Parameters
    ----------
    source : str
        Model folder or hub id.
    tasks : sequence of (Task, Path)
        In the order of learning, with the path each was read from (for the record).
    settings : Settings
    out : Path
        Folder of the run; its files are listed in ``docs/training.md``. Until the run is complete
        they are in ``<out>.unfinished``.
    texts : sequence of (name, path)
        General texts for perplexity.
    overwrite : bool
        Replace a run that is already there, once this one is complete.
    resume : bool
        Go on with an unfinished run in `out`, which ends with the same weights and results as if it
        had not been interrupted. Without one it is started; a complete one is left as it is, unless
        `tasks` has more tasks at its end: these are then learned as if they had been there.
    checkpoint_steps : int, optional
        Keep the training of a task on disk after every so many steps.
    checkpoint_seconds : float
        And when so much time has passed.
    save : bool
        Save the trained model.
    report : bool
        Write ``report.html`` and its figures after every task. A report that fails ends no run.
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
    ResumeError
        If the run to be resumed has other settings, data, or another base model; if it is of method
        ``full`` and tasks are appended.
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
    if checkpoint_steps is not None and checkpoint_steps < 1:
        raise ValueError(
            f"piece_ops.run: checkpoint_steps must be at least 1, got {checkpoint_steps}"
        )
    check_names([task.name for task, _ in tasks], "task")
    folder = RunFolder(out, overwrite, resume)
    work = Work(source, tasks, settings, texts, show, say)
    if folder.is_complete:
        state = RunState.read(folder.out)
        count = state.appended(work.state.identity)
        if not count:
            folder.tidy()
            say(f"the run in {folder.out} is complete; there is nothing to do")
            return state.results
        state.extend(work.state.identity, work.state.results.tasks[-count:])
        folder.extend(state.write)
    for record in work.state.results.tasks:
        if record.truncated_rows:
            say(
                f"task {record.name}: {record.truncated_rows} rows are longer than "
                f"{settings.max_tokens} tokens; the start of their prompts is cut off"
            )
        if record.cut_answers:
            say(
                f"task {record.name}: {record.cut_answers} answers are longer than "
                f"{settings.max_answer_tokens} tokens; their end is cut off"
            )
    with folder:
        if resume and (folder.work / STATE).exists():
            work.resume(folder.work)
        elif resume:
            say(f"there is no run in {folder.out} to go on with; starting one")
        work.go(folder.work, save, checkpoint_steps, checkpoint_seconds, report)
        folder.finish()
    return work.state.results
