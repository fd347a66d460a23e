"""The training floor: tasks, encoding, evaluation, the continual run and its results.

It needs the ``train`` extra (``pip install piece_ops[train]``); the kernels below it do not.
"""

from __future__ import annotations

from piece_ops.training.continual import run
from piece_ops.training.encoding import Encoder
from piece_ops.training.measure import Score, evaluate, perplexity
from piece_ops.training.models import load_model, load_tokenizer
from piece_ops.training.results import Results
from piece_ops.training.settings import Settings
from piece_ops.training.tasks import Row, Task, load_task

__all__ = [
    "Encoder",
    "Results",
    "Row",
    "Score",
    "Settings",
    "Task",
    "evaluate",
    "load_model",
    "load_task",
    "load_tokenizer",
    "perplexity",
    "run",
]
