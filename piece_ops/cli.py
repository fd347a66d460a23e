"""The ``piece-ops`` command: train, report, eval, select, delta, bench (cli_*.py), info.

Errors are one line on standard error and exit status 2; ``--debug`` shows where they come from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from piece_ops import METHODS, __version__, _native, cli_bench, cli_delta
from piece_ops.training.options import (
    add_evaluation,
    add_model,
    add_run,
    add_selection,
    add_training,
    settings_of,
    tasks_of,
    texts_of,
)
from piece_ops.training.settings import TRAIN_METHODS


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = Parser(prog="piece-ops", description="Sparse in-place fine-tuning.")
    parser.add_argument("--version", action="version", version=f"piece_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    train = commands.add_parser(
        "train", help="learn tasks one after another and measure what each gains and costs"
    )
    add_model(train)
    add_selection(train, TRAIN_METHODS)
    add_training(train)
    add_evaluation(train)
    add_run(train)
    train.set_defaults(function=_train)

    evaluation = commands.add_parser("eval", help="measure a model on tasks and general texts")
    add_model(evaluation)
    add_evaluation(evaluation)
    evaluation.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers")
    evaluation.set_defaults(function=_eval)

    select = commands.add_parser(
        "select", help="choose coordinates for a task and show where they lie"
    )
    add_model(select)
    add_selection(select, METHODS)
    select.add_argument(
        "--out", type=Path, metavar="FILE.safetensors", help="also save the selection"
    )
    select.set_defaults(function=_select)

    report = commands.add_parser("report", help="one page about a run, or about several compared")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    report.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE.html",
        help="the page; its figures are also written as PNG into FILE-figures",
    )
    report.add_argument(
        "--summary", action="store_true", help="only the comparison of the runs, a small page"
    )
    report.set_defaults(function=_report)

    deltas = cli_delta.add_commands(commands)
    bench = cli_bench.add_command(commands)

    info = commands.add_parser("info", help="say what this build holds")
    info.set_defaults(function=_info)

    for command in (train, report, evaluation, select, *deltas, bench, info):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops train``."""
    from piece_ops.training.continual import run
    from piece_ops.training.page import REPORT
    from piece_ops.training.report import format_results

    results = run(
        arguments.model,
        tasks_of(arguments),
        settings_of(arguments),
        arguments.out,
        texts=texts_of(arguments),
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        checkpoint_steps=arguments.checkpoint_every,
        checkpoint_seconds=arguments.checkpoint_seconds,
        save=not arguments.no_save_model,
        report=not arguments.no_report,
        show=sys.stderr.isatty(),
    )
    print()
    print(format_results(results))
    report = arguments.out / REPORT
    print(f"written to {arguments.out}" + (f"; look at {report}" if report.exists() else ""))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops report``."""
    from piece_ops.training.page import write_report

    written = write_report(arguments.runs, arguments.out, summary=arguments.summary)
    print(f"written to {written[0]}, with {len(written) - 1} figures beside it")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops eval``."""
    from piece_ops._files import write_json
    from piece_ops.training.data import check_names, load_texts, make_encoder
    from piece_ops.training.measure import evaluate, text_loss
    from piece_ops.training.models import load_model, load_tokenizer, resolve_device
    from piece_ops.training.report import format_table, nats, percent, perplexity_text

    settings = settings_of(arguments)
    device = resolve_device(settings.device)
    tasks = [task for task, _ in tasks_of(arguments)]
    check_names([task.name for task in tasks], "task")
    encoder = make_encoder(load_tokenizer(arguments.model), settings)
    texts = load_texts(encoder, texts_of(arguments), settings)
    model = load_model(arguments.model, dtype=settings.dtype, device=device)
    rows, found = [], {}
    for task in tasks:
        score = evaluate(
            model,
            encoder,
            task.held_out,
            settings.eval_batch_size,
            show=sys.stderr.isatty(),
            metric=task.metric,
            most_tokens=settings.max_new_tokens,
        )
        found[task.name] = {**vars(score), "metric": task.metric}
        rows.append(
            [task.name, task.metric, str(score.rows), percent(score.accuracy), nats(score.loss)]
        )
    print(format_table(["task", "metric", "rows", "score %", "answer loss"], rows))
    losses = {}
    for text in texts:
        losses[text.name] = text_loss(
            model, encoder, text, settings.eval_batch_size, show=sys.stderr.isatty()
        )
    if texts:
        print()
        rows = [[name, perplexity_text(loss)] for name, loss in losses.items()]
        print(format_table(["text", "perplexity"], rows))
    if arguments.out:
        write_json(
            arguments.out, {"model": arguments.model, "tasks": found, "general_loss": losses}
        )
    return 0


def _select(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops select``."""
    from piece_ops.training.choose import Chooser
    from piece_ops.training.data import make_encoder
    from piece_ops.training.models import load_model, load_tokenizer, resolve_device
    from piece_ops.training.tasks import TaskError

    settings = settings_of(arguments)
    device = resolve_device(settings.device)
    tasks = [task for task, _ in tasks_of(arguments)]
    if len(tasks) != 1:
        raise TaskError(f"piece-ops select: wanted one --task, got {len(tasks)}")
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise TaskError(f"--out: there is no folder {arguments.out.absolute().parent}")
    encoder = make_encoder(load_tokenizer(arguments.model), settings)
    chooser = Chooser(encoder, settings)
    rows = encoder.encode_all(tasks[0].train)
    model = load_model(arguments.model, dtype=settings.dtype, device=device)
    selection = chooser.select(model, rows, tasks[0].name, 0, show=sys.stderr.isatty())
    print(selection.report())
    if arguments.out:
        selection.save(arguments.out)
        print(f"written to {arguments.out}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops info``."""
    found = _native.describe()
    architectures = ", ".join(str(item) for item in found["cuda_architectures"])
    rows = [
        ("piece_ops", __version__),
        ("torch", found["torch"]),
        ("extension", f"{found['extension']} (version {found['version']})"),
        ("instruction set", f"{found['isa']} (this build and CPU: {', '.join(found['isas'])})"),
        ("PIECE_OPS_ISA", found["isa_forced"] or "not set"),
        ("threads", str(found["threads"])),
        ("CUDA kernels", architectures or "not in this build"),
        ("CUDA in torch", str(torch.version.cuda or "no")),
        ("GPU", found["gpu"] or "none"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _one_line(error: BaseException) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; ``sys.argv`` by default.

    Returns
    -------
    int
        0 when done, 2 for an error that was reported, 130 when interrupted.

    Examples
    --------
    >>> main(["info"])  # doctest: +SKIP
    """
    parsed = build_parser().parse_args(arguments)
    if not sys.stderr.isatty():
        # In a log file a progress bar is one line for every step; tqdm reads this when imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        return int(parsed.function(parsed))
    except KeyboardInterrupt:
        if parsed.debug:
            raise
        hint = "; the same command with --resume goes on" if parsed.command == "train" else ""
        print(f"piece-ops {parsed.command}: interrupted{hint}", file=sys.stderr)
        return 130
    # What bad input, a full disk, too little memory or a missing package raise; anything else is a
    # defect and keeps its traceback.
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if parsed.debug:
            raise
        print(f"piece-ops {parsed.command}: {_one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
