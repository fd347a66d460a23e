"""The phases of a continual run, each of which leaves its result on the disk.

Base model: measured. Every task: selected, trained, its statistics kept if asked, measured. After
each phase the state file says so; a run that was killed goes on from there. The model itself is not
stored between tasks: it is the base model with the deltas of the tasks so far.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from piece_ops._files import write_folder
from piece_ops.delta import Delta
from piece_ops.delta.fingerprint import fingerprint
from piece_ops.selection import Selection
from piece_ops.training.benchmarks import check_lm_eval
from piece_ops.training.checkpoint import Keeper, read_checkpoint
from piece_ops.training.choose import Chooser
from piece_ops.training.data import Data
from piece_ops.training.learner import make_learner
from piece_ops.training.models import load_model, resolve_device, save_model
from piece_ops.training.output import TaskFiles
from piece_ops.training.page import keep_report
from piece_ops.training.reading import union
from piece_ops.training.results import Results
from piece_ops.training.rows import Rows, metered
from piece_ops.training.settings import Settings
from piece_ops.training.state import RunState, differences, made_with
from piece_ops.training.tasks import Task
from piece_ops.training.train import train_task


class Work:
    """A run: its data and model in memory, its state, and its phases.

    Parameters
    ----------
    source : str
        Model folder or hub id.
    tasks : sequence of (Task, Path)
    settings : Settings
    texts : sequence of (name, path)
    show : bool
        Show progress bars.
    say : callable
        Gets one line at a time.
    """

    def __init__(
        self,
        source: str,
        tasks: Sequence[tuple[Task, Path]],
        settings: Settings,
        texts: Sequence[tuple[str, Path]],
        show: bool,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.show, self.say = settings, show, say
        device = resolve_device(settings.device)
        # Everything that can be wrong with the data is found here, before the model is loaded.
        data = Data(source, tasks, settings, texts)
        self.tasks, self.texts, self.train_rows = data.tasks, data.texts, data.train_rows
        self.tokenizer, self.encoder = data.tokenizer, data.encoder
        self.chooser = Chooser(self.encoder, settings)
        if settings.lm_eval:
            check_lm_eval()
        seconds: dict[str, float] = {}
        memory: dict[str, int] = {}
        with metered(seconds, memory, "load"):
            self.model = load_model(source, dtype=settings.dtype, device=device)
        results = Results(
            model=source,
            settings=settings,
            parameters=sum(p.numel() for p in self.model.parameters()),
            tasks=data.task_records,
            texts=data.text_records,
            base_seconds=seconds,
            base_memory=memory,
        )
        self._rows = Rows(
            self.model, self.tokenizer, self.encoder, self.tasks, self.texts, settings, show
        )
        base = fingerprint(dict(self.model.named_parameters()), {}, {})
        identity = data.identity(replace(settings, device=device), self.chooser.reference, base)
        self.state = RunState(identity, made_with(), results)
        self._parent = ""  # digest of the last delta that the model holds

    # ------------------------------------------------------------------------- going on, running

    def resume(self, folder: Path) -> None:
        """Take over the state of an interrupted run, and bring the model to where it was.

        Raises
        ------
        ResumeError
            If the run in `folder` is another one; the text names every difference.
        ValueError
            If one of its files is damaged.
        """
        state = RunState.read(folder)
        state.check_same(self.state.identity)
        changed = differences(state.made_with, self.state.made_with)
        if changed:
            self.say(
                f"note: the run was started on another machine or with other versions "
                f"({'; '.join(changed)}), so its last bits may differ"
            )
        self.state = state
        state.results.write(folder)
        self.say(f"going on with the run in {folder}: {self._where()}")
        if state.results.complete:
            return
        if state.phase == "extend":
            self._rows.measure_appended(state, 0, folder)
        for i in range(state.trained):
            files = self._files(folder, i)
            if self.settings.is_sparse:
                delta = Delta.load(files.delta)
                if delta.parent != self._parent:
                    raise ValueError(
                        f"resume: {files.delta} must be a delta made on top of "
                        f"{self._parent[:12] or 'the base model'}, got one made on top of "
                        f"{delta.parent[:12] or 'the base model'}"
                    )
                delta.apply_(self.model)
                self._parent = delta.digest
            elif self.settings.method == "lora" or i == state.trained - 1:
                learner = make_learner(self.model, self.settings, None)
                read_checkpoint(files.checkpoint).load_values(learner)
                learner.finish()
        for i in range(state.kept_statistics if self.settings.keep_statistics else 0):
            self.chooser.use_statistics(folder / "statistics" / f"{self.tasks[i].name}.safetensors")

    def go(
        self,
        folder: Path,
        save: bool,
        checkpoint_steps: int | None,
        checkpoint_seconds: float,
        report: bool,
    ) -> None:
        """Do all phases that are not done yet; the run is then complete."""
        state = self.state
        if not state.results.complete:
            self._phases(folder, checkpoint_steps, checkpoint_seconds, report)
            if save:
                results = state.results
                with metered(results.base_seconds, results.base_memory, "save"):
                    write_folder(
                        folder / "model", lambda made: save_model(self.model, self.tokenizer, made)
                    )
            state.results.complete = True
            state.write(folder)
        # Also of a run that was killed just here.
        state.results.write(folder)
        if report:
            keep_report(folder, self.say)
        if self.settings.method == "full":
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _phases(
        self,
        folder: Path,
        checkpoint_steps: int | None,
        checkpoint_seconds: float,
        report: bool,
    ) -> None:
        state = self.state
        state.write(folder)
        while state.phase != "save":
            i = state.place - 1
            if state.phase == "select":
                self._select(folder, i)
            elif state.phase == "train":
                self._train(i, Keeper(self._files(folder, i), checkpoint_steps, checkpoint_seconds))
            elif state.phase == "statistics":
                self._keep_statistics(folder, i)
            elif state.phase == "extend":
                self._rows.measure_appended(state, state.place, folder)
            else:
                self._rows.measure(state, folder)
            was_measured = state.phase == "measure"
            state.advance()
            state.write(folder)
            self._clean(folder)
            if was_measured:
                state.results.write(folder)
                if i >= 0:
                    self.say(self._line(i))
                if report and 0 <= i < len(self.tasks) - 1:
                    keep_report(folder, self.say)

    def _files(self, folder: Path, i: int) -> TaskFiles:
        return TaskFiles.of(folder, i, self.tasks[i].name)

    def _where(self) -> str:
        """Say what the next phase is."""
        state = self.state
        if state.phase == "save":
            return "all tasks are done"
        if state.place == 0:
            return "measuring the base model"
        doing = {"select": "selection", "train": "training", "measure": "measuring"}
        doing["extend"] = "measuring appended tasks"
        task = f"task {state.place} of {len(self.tasks)}, {self.tasks[state.place - 1].name}"
        return f"{task}, {doing.get(state.phase, state.phase)}"

    def _clean(self, folder: Path) -> None:
        """Remove what only a task under way needs; of all weights only the newest state is kept."""
        if self.state.phase in ("select", "train"):
            return
        shutil.rmtree(folder / "parts", ignore_errors=True)
        if self.settings.method == "full":
            for i in range(self.state.place - 1):
                self._files(folder, i).checkpoint.unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------- phases

    def _select(self, folder: Path, i: int) -> None:
        """Choose the coordinates of task `i`."""
        if not self.settings.is_sparse:
            return
        record = self.state.results.tasks[i]
        with metered(record.seconds, record.memory, "select"):
            selection = self.chooser.select(
                self.model,
                self.train_rows[i],
                self.tasks[i].name,
                i,
                self.show,
                exclude=self._protected(folder, i),
            )
            selection.save(self._files(folder, i).selection(0))
            record.threshold = selection.threshold

    def _protected(self, folder: Path, i: int) -> dict[str, Tensor] | None:
        """Return the coordinates that earlier tasks selected, if they are to be kept."""
        if not self.settings.protect:
            return None
        files = (self._files(folder, earlier) for earlier in range(i))
        return union(Selection.load(path) for of in files for path in of.selections())

    def _train(self, i: int, keeper: Keeper) -> None:
        """Train task `i` and keep what it changed."""
        settings, task, rows = self.settings, self.tasks[i], self.train_rows[i]
        record, files = self.state.results.tasks[i], keeper.files

        def reselect(segment: int) -> Selection:
            exclude = self._protected(files.folder, i)
            return self.chooser.select(
                self.model, rows, task.name, i, self.show, segment=segment, exclude=exclude
            )

        with metered(record.seconds, record.memory, "train"):
            trained = train_task(
                self.model,
                self.encoder,
                rows,
                task.name,
                settings,
                Selection.load(files.selection(0)) if settings.is_sparse else None,
                self.show,
                keeper=keeper,
                reselect=reselect,
                parent=self._parent,
            )
            if trained.delta is not None:
                trained.delta.save(files.delta)
                self._parent = trained.delta.digest
        record.seconds["train"] = round(record.seconds["train"] + trained.seconds_before, 2)
        record.trained = trained.trained
        record.losses = [round(loss, 5) for loss in trained.losses]

    def _keep_statistics(self, folder: Path, i: int) -> None:
        """Store what task `i` needs, for the selections that follow."""
        if not self.settings.keep_statistics:
            return
        record = self.state.results.tasks[i]
        with metered(record.seconds, record.memory, "statistics"):
            self.chooser.keep_statistics(
                self.model, self.train_rows[i], self.tasks[i].name, folder / "statistics"
            )

    def _line(self, i: int) -> str:
        """Say in one line what a task brought."""
        results = self.state.results
        before, after = results.accuracy[0][i], results.accuracy[i + 1][i]
        record = results.tasks[i]
        seconds = sum(record.seconds.values())
        return (
            f"task {i + 1} of {len(self.tasks)}, {record.name}: {100 * (before or 0):.0f} % right "
            f"before, {100 * (after or 0):.0f} % after ({record.trained:,} parameters trained, "
            f"{seconds:.0f} s)"
        )
