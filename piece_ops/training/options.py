"""Options of the command line that stand for settings, tasks and texts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from piece_ops.training.checkpoint import CHECKPOINT_SECONDS
from piece_ops.training.settings import Settings
from piece_ops.training.tasks import TaskError, load_task, split_argument, split_pair

DEFAULTS = {field.name: field.default for field in fields(Settings)}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model, the tasks, and how rows become tokens."""
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
    _add(
        group,
        "--max-answer-tokens",
        type=int,
        help="longer answers are cut to so many tokens, and end without an end token",
    )
    _add(group, "--train-rows", type=int, help="use only the first so many training rows of a task")
    _add(group, "--held-out-rows", type=int, help="measure on the first so many rows only")
    _add(group, "--dtype", help="of the weights: float32 or bfloat16")
    _add(group, "--device", help="auto (a GPU if this build has kernels for it), cpu or cuda")
    _add(group, "--seed", type=int, help="decides every order and every sample")


def _add(group: Any, option: str, *, help: str, **more: Any) -> None:
    """Add an option that stands for a field of `Settings`, with that field's default."""
    default = DEFAULTS[option.removeprefix("--").replace("-", "_")]
    shown = "" if default in (None, ()) else f" (default: {default})"
    group.add_argument(option, default=default, help=help + shown, **more)


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add general texts, metrics, and how much is measured."""
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
    group.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME=METRIC",
        help="how a task's answers are scored: exact (default), letter, number, edit, rouge-l or "
        "bleu; may be given for several tasks",
    )
    _add(group, "--max-new-tokens", type=int, help="longest answer; default: what the task needs")


def add_selection(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """Add the method, one of `methods`, and what it needs."""
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
    _add(
        group,
        "--memory-budget",
        type=int,
        metavar="BYTES",
        help="for the sums that a selection needs; more passes, the same selection",
    )
    _add(group, "--accumulators", help="of these sums: float32 or bfloat16 (half the bytes)")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add everything about optimizer steps."""
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
        help="store what each task needs; piece-g also keeps away from what earlier ones need",
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add what only a run has: its folder, going on, benchmarks."""
    benchmarks = parser.add_argument_group("general ability by lm_eval (a package of its own)")
    _add(benchmarks, "--lm-eval", nargs="+", metavar="TASK", help="names of its tasks")
    _add(benchmarks, "--lm-eval-limit", type=int, metavar="ROWS", help="rows of each; default: all")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in DIR")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted run, with the same options as when it was started; or with "
        "a complete one, to which tasks are appended",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="keep the training on disk after every so many steps",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=CHECKPOINT_SECONDS,
        metavar="SECONDS",
        help="and after so much time (default: %(default)g)",
    )
    parser.add_argument("--no-save-model", action="store_true", help="keep the results only")
    parser.add_argument(
        "--no-report", action="store_true", help="write no report.html (piece-ops report does)"
    )


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Make the settings from the options that stand for them."""
    given = {name: getattr(arguments, name) for name in DEFAULTS if hasattr(arguments, name)}
    if "lm_eval" in given:
        given["lm_eval"] = tuple(given["lm_eval"])
    return Settings(**given)


def tasks_of(arguments: argparse.Namespace) -> list[Any]:
    """Read the tasks, each with its path."""
    settings_of(arguments)  # a number out of range is an error before any file is read
    named = [split_argument(argument, "--task") for argument in arguments.task]
    metrics = dict(
        split_pair(argument, "--metric") for argument in getattr(arguments, "metric", ())
    )
    for name in metrics:
        if name not in dict(named):
            raise TaskError(f"--metric: wanted the name of a task, got {name!r}")
    return [
        (
            load_task(
                name,
                path,
                seed=arguments.seed,
                prefer=arguments.held_out,
                metric=metrics.get(name, "exact"),
                train_rows=arguments.train_rows,
                held_out_rows=arguments.held_out_rows,
            ),
            path,
        )
        for name, path in named
    ]


def texts_of(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """Take the general texts' options apart."""
    return [split_argument(argument, "--general") for argument in arguments.general]
