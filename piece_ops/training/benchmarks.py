"""General ability by the tasks of lm_eval, an optional package."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from piece_ops.training.extra import require

INSTALL = "lm_eval"


def check_lm_eval() -> None:
    """Raise ModuleNotFoundError, saying what to install, when lm_eval is not there."""
    require("lm_eval", "general ability by lm_eval tasks", INSTALL)


def lm_eval_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None, batch_size: int
) -> dict[str, float]:
    """Measure a model on tasks of lm_eval.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its mode is put back afterwards, and so are the random states, which lm_eval seeds.
    tokenizer : transformers.PreTrainedTokenizerBase
    tasks : sequence of str
        Names of tasks or groups, or paths of their YAML files.
    limit : int, optional
        Use only so many rows of each task.
    batch_size : int

    Returns
    -------
    dict of str to float
        ``"<task> <metric>"``, for every metric that is a number, errors left out.
    """
    harness = require("lm_eval", "general ability by lm_eval tasks", INSTALL)
    wrap = require("lm_eval.models.huggingface", "general ability by lm_eval tasks", INSTALL).HFLM
    was_training = model.training
    model.eval()
    try:
        with _random_states_kept(model.device):
            found = harness.simple_evaluate(
                model=wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                limit=limit,
                bootstrap_iters=0,
            )
    finally:
        model.train(was_training)
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in sorted(found["results"].items())
        for metric, value in sorted(metrics.items())
        if isinstance(value, (int, float)) and "stderr" not in metric and metric != "sample_len"
    }


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Put the states of torch's, numpy's and Python's generators back afterwards."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
