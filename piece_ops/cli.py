"""The ``piece-ops`` command: train, eval, select, info.

Errors are one line on standard error and exit status 2; ``--debug`` shows where they come from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from piece_ops import METHODS, __version__, _native
from piece_ops.training.checkpoint import CHECKPOINT_SECONDS
from piece_ops.training.settings import TRAIN_METHODS, Settings

DEFAULTS = {field.name: field.default for field in fields(Settings)}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", required=True, metavar="DIR_OR_ID", help="model folder or hub id")
    group.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help='a .jsonl file with rows {"prompt": ..., "answer": ...} (a fifth of them is held '
        "out), or a folder with train.jsonl and, if there are any, eval.jsonl and test.jsonl; may "
        "be given several times",
    )
    group.add_argument(
        "--held-out",
        choices=("test", "eval"),
        default="test",
        help="which file of a task folder to measure on (default: test)",
    )
    _add(group, "--prompt-format", help="auto: the tokenizer's chat template if it has one")
    _add(
        group, "--max-tokens", type=int, help="longest row; the start of longer prompts is cut off"
    )
    _add(group, "--dtype", help="of the weights: float32 or bfloat16")
    _add(group, "--seed", type=int, help="decides every order and every sample")


def _add(group: Any, option: str, *, help: str, **more: Any) -> None:
    """Add an option that stands for a field of `Settings`, with that field's default."""
    default = DEFAULTS[option.removeprefix("--").replace("-", "_")]
    shown = "" if default is None else f" (default: {default})"
    group.add_argument(option, default=default, help=help + shown, **more)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--general",
        action="append",
        default=[],
        metavar="NAME=FILE.txt",
        help="a text whose perplexity stands for general ability; may be given several times",
    )
    _add(group, "--window", type=int, help="tokens of general text read at once")
    _add(group, "--general-tokens", type=int, help="tokens of each general text that are used")
    _add(group, "--eval-batch-size", type=int, help="rows in one pass")


def _add_selection(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    group = parser.add_argument_group("selection")
    _add(group, "--method", choices=methods, help="how to choose what is trained")
    _add(group, "--density", type=float, help="share of all parameters that is trained")
    _add(
        group, "--importance-rows", type=int, help="training rows the importance is estimated from"
    )
    _add(
        group,
        "--reference",
        metavar="self|NAME=FILE",
        help="piece-g: what must be kept: text the model samples from itself, or a file (.jsonl "
        "rows or text)",
    )
    _add(group, "--reference-rows", type=int, help="piece-g: texts or rows of the reference")
    _add(group, "--reference-tokens", type=int, help="piece-g: most tokens of a reference text")
    _add(group, "--xi", type=float, help="piece-s: the constant under the root; default 1/rows")
    group.add_argument(
        "--embeddings", action="store_true", help="let the input embeddings be selected, too"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    _add(group, "--lr", type=float, help="peak learning rate")
    _add(group, "--steps", type=int, help="optimizer steps a task")
    _add(group, "--epochs", type=float, help="or passes over its rows; 3 when neither is given")
    _add(group, "--batch-size", type=int, help="rows in one forward and backward pass")
    _add(group, "--accumulation", type=int, help="passes for one optimizer step")
    _add(group, "--warmup", type=float, help="share of the steps with a rising rate")
    _add(group, "--clip", type=float, help="largest norm of the gradient; 0: no clipping")
    _add(group, "--weight-decay", type=float, help="decay of the trained values")
    _add(group, "--lora-rank", type=int, help="lora: its rank; alpha is twice the rank")
    _add(group, "--refresh", type=int, metavar="STEPS", help="select again after so many steps")
    group.add_argument(
        "--protect", action="store_true", help="keep coordinates of earlier tasks out of selections"
    )
    group.add_argument(
        "--keep-statistics",
        action="store_true",
        help="piece-g: also keep away from what the earlier tasks need, by stored statistics",
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = Parser(prog="piece-ops", description="Sparse in-place fine-tuning.")
    parser.add_argument("--version", action="version", version=f"piece_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    train = commands.add_parser(
        "train", help="learn tasks one after another and measure what each gains and costs"
    )
    _add_model(train)
    _add_selection(train, TRAIN_METHODS)
    _add_training(train)
    _add_evaluation(train)
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is in DIR")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted run; give the same options as when it was started",
    )
    train.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="keep the training on disk after every so many steps",
    )
    train.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=CHECKPOINT_SECONDS,
        metavar="SECONDS",
        help="and after so much time (default: %(default)g)",
    )
    train.add_argument("--no-save-model", action="store_true", help="keep the results only")
    train.set_defaults(function=_train)

    evaluation = commands.add_parser("eval", help="measure a model on tasks and general texts")
    _add_model(evaluation)
    _add_evaluation(evaluation)
    evaluation.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers")
    evaluation.set_defaults(function=_eval)

    select = commands.add_parser(
        "select", help="choose coordinates for a task and show where they lie"
    )
    _add_model(select)
    _add_selection(select, METHODS)
    select.add_argument(
        "--out", type=Path, metavar="FILE.safetensors", help="also save the selection"
    )
    select.set_defaults(function=_select)

    info = commands.add_parser("info", help="say what this build holds")
    info.set_defaults(function=_info)

    for command in (train, evaluation, select, info):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    """Make the settings from the options that stand for them."""
    given = {name: getattr(arguments, name) for name in DEFAULTS if hasattr(arguments, name)}
    return Settings(**given)


def _tasks(arguments: argparse.Namespace) -> list[Any]:
    """Read the tasks, each with its path."""
    from piece_ops.training.tasks import load_task, split_argument

    named = [split_argument(argument, "--task") for argument in arguments.task]
    return [
        (load_task(name, path, seed=arguments.seed, prefer=arguments.held_out), path)
        for name, path in named
    ]


def _texts(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """Take the general texts' options apart."""
    from piece_ops.training.tasks import split_argument

    return [split_argument(argument, "--general") for argument in arguments.general]


def _train(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops train``."""
    from piece_ops.training.continual import run
    from piece_ops.training.report import format_results

    results = run(
        arguments.model,
        _tasks(arguments),
        _settings(arguments),
        arguments.out,
        texts=_texts(arguments),
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        checkpoint_steps=arguments.checkpoint_every,
        checkpoint_seconds=arguments.checkpoint_seconds,
        save=not arguments.no_save_model,
        show=sys.stderr.isatty(),
    )
    print()
    print(format_results(results))
    print(f"written to {arguments.out}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops eval``."""
    from piece_ops._files import write_json
    from piece_ops.training.encoding import Encoder
    from piece_ops.training.measure import evaluate, text_loss
    from piece_ops.training.models import load_model, load_tokenizer
    from piece_ops.training.report import format_table, nats, percent, perplexity_text
    from piece_ops.training.work import check_names, load_texts

    settings = _settings(arguments)
    tasks = [task for task, _ in _tasks(arguments)]
    check_names([task.name for task in tasks], "task")
    encoder = Encoder(load_tokenizer(arguments.model), settings.prompt_format, settings.max_tokens)
    texts = load_texts(encoder, _texts(arguments), settings)
    model = load_model(arguments.model, dtype=settings.dtype)
    rows, found = [], {}
    for task in tasks:
        score = evaluate(
            model, encoder, task.held_out, settings.eval_batch_size, show=sys.stderr.isatty()
        )
        found[task.name] = vars(score)
        rows.append([task.name, str(score.rows), percent(score.accuracy), nats(score.loss)])
    print(format_table(["task", "rows", "right %", "answer loss"], rows))
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
    from piece_ops.training.encoding import Encoder
    from piece_ops.training.models import load_model, load_tokenizer
    from piece_ops.training.tasks import TaskError

    settings = _settings(arguments)
    tasks = [task for task, _ in _tasks(arguments)]
    if len(tasks) != 1:
        raise TaskError(f"piece-ops select: wanted one --task, got {len(tasks)}")
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise TaskError(f"--out: there is no folder {arguments.out.absolute().parent}")
    encoder = Encoder(load_tokenizer(arguments.model), settings.prompt_format, settings.max_tokens)
    chooser = Chooser(encoder, settings)
    rows = encoder.encode_all(tasks[0].train)
    model = load_model(arguments.model, dtype=settings.dtype)
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
        print(f"piece-ops {parsed.command}: interrupted", file=sys.stderr)
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
