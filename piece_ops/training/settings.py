"""The settings of a continual run, checked once, before anything is loaded or written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from piece_ops.importance import METHODS
from piece_ops.importance.statistics import DTYPES as ACCUMULATORS
from piece_ops.training.encoding import FORMATS
from piece_ops.training.models import DEVICES, DTYPES

TRAIN_METHODS = (*METHODS, "lora", "full")
"""The selection methods, and for comparison a LoRA adapter and every weight."""


@dataclass(frozen=True)
class Settings:
    """What decides a run, beside the model, the tasks and the texts.

    Parameters
    ----------
    method : str
        One of `TRAIN_METHODS`.
    density : float
        Share of all parameters to train, above 0, at most 1. Not used by ``full`` and ``lora``.
    lr : float
        Peak learning rate, above 0.
    steps : int, optional
        Optimizer steps a task. Give this or `epochs`.
    epochs : float, optional
        Passes over a task's training rows, rounded up to whole steps.
    batch_size : int
        Rows in one forward and backward pass.
    accumulation : int
        Passes whose gradients are averaged for one optimizer step.
    warmup : float
        Share of the steps over which the rate rises linearly from 0; it then falls linearly to 0. 0
        to 1.
    clip : float
        Largest 2-norm of the gradient of the trained values; 0 turns clipping off.
    weight_decay : float
        Decoupled decay of the trained values, at least 0.
    importance_rows : int
        Training rows that the importance is estimated from (fewer when the task has fewer).
    reference : str
        For ``piece-g``: ``"self"`` (text that the model samples from itself) or NAME=FILE.
    reference_rows, reference_tokens : int
        How many texts (or rows of the file) the reference has, and the most tokens of a text.
    keep_statistics : bool
        Store what each task needs, as square sums; ``piece-g`` also keeps away from what the
        earlier tasks need.
    xi : float, optional
        For ``piece-s``: the constant under the root, on the mean scale; None is 1 / importance
        rows.
    protect : bool
        Keep the coordinates of earlier tasks out of the selections of later ones.
    refresh : int, optional
        Select again after every so many steps of a task, and carry the optimizer's state over.
    lora_rank : int
        For ``lora``; its alpha is twice the rank.
    embeddings : bool
        Whether the input embeddings may be selected.
    memory_budget : int, optional
        Bytes for the sums that a selection needs; None: as many as it takes. See `estimate`.
    accumulators : {"float32", "bfloat16"}
        Data type of these sums. Stored statistics are float32.
    prompt_format : {"auto", "chat", "plain"}
        See `Encoder`.
    max_tokens : int
        Longest training row in tokens.
    max_answer_tokens : int, optional
        Longer answers are cut to so many tokens, for training and for the answer loss; None: all.
    train_rows, held_out_rows : int, optional
        Use no more than so many rows of a task, the first ones; None: all.
    eval_batch_size : int
        Rows in one pass of an evaluation.
    window : int
        Tokens of one window of general text.
    general_tokens : int
        Tokens of each general text that are used, from its start.
    max_new_tokens : int, optional
        Longest answer in an evaluation; None: what the task's metric needs.
    lm_eval : tuple of str
        Tasks of lm_eval that stand for general ability, too.
    lm_eval_limit : int, optional
        Rows of each of them.
    dtype : {"float32", "bfloat16"}
        Data type of the weights.
    device : {"auto", "cpu", "cuda"}
        Where to work; ``"auto"``: see `piece_ops.training.models.resolve_device`.
    gradient_checkpointing : bool
        Recompute activations in the backward pass: less memory, about a third more time.
    seed : int
        Decides the order of rows, the split of single files, sampled texts and the ``random``
        selection.

    Raises
    ------
    ValueError
        For a value out of its range, naming the setting, what was wanted and what came.

    Examples
    --------
    >>> Settings(method="piece-g", lr=5e-3, steps=40).density
    0.001
    """

    method: str = "piece-g"
    density: float = 1e-3
    lr: float = 5e-3
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    importance_rows: int = 64
    reference: str = "self"
    reference_rows: int = 32
    reference_tokens: int = 64
    keep_statistics: bool = False
    xi: float | None = None
    protect: bool = False
    refresh: int | None = None
    lora_rank: int = 8
    embeddings: bool = False
    memory_budget: int | None = None
    accumulators: str = "float32"
    prompt_format: str = "auto"
    max_tokens: int = 512
    max_answer_tokens: int | None = None
    train_rows: int | None = None
    held_out_rows: int | None = None
    eval_batch_size: int = 16
    window: int = 256
    general_tokens: int = 8192
    max_new_tokens: int | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._one_of("method", TRAIN_METHODS)
        self._one_of("prompt_format", FORMATS)
        self._one_of("dtype", tuple(DTYPES))
        self._one_of("device", DEVICES)
        self._one_of("accumulators", tuple(ACCUMULATORS))
        self._check("density", 0 < self.density <= 1, "above 0 and at most 1")
        self._check("lr", 0 < self.lr < math.inf, "a finite number above 0")
        self._check("warmup", 0 <= self.warmup <= 1, "between 0 and 1")
        self._check("clip", 0 <= self.clip < math.inf, "a finite number, 0 (no clipping) or above")
        self._check(
            "weight_decay", 0 <= self.weight_decay < math.inf, "a finite number, 0 or above"
        )
        if self.xi is not None:
            self._check("xi", 0 < self.xi < math.inf, "a finite number above 0")
        for name in (
            "batch_size",
            "accumulation",
            "importance_rows",
            "reference_rows",
            "lora_rank",
            "eval_batch_size",
        ):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name, least in (
            ("max_tokens", 8),
            ("window", 2),
            ("reference_tokens", 2),
            ("general_tokens", 2),
        ):
            self._check(name, getattr(self, name) >= least, f"at least {least}")
        for name in (
            "refresh",
            "max_answer_tokens",
            "train_rows",
            "held_out_rows",
            "max_new_tokens",
            "lm_eval_limit",
            "memory_budget",
        ):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        if self.lm_eval_limit is not None and not self.lm_eval:
            raise ValueError("piece_ops.Settings: lm_eval_limit belongs to lm_eval, got no tasks")
        if not self.is_sparse and (self.protect or self.refresh or self.keep_statistics):
            raise ValueError(
                "piece_ops.Settings: protect, refresh and keep_statistics belong to methods that "
                f"select, got method {self.method}"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                "piece_ops.Settings: wanted steps or epochs, got both "
                f"(steps {self.steps}, epochs {self.epochs})"
            )
        if self.steps is not None:
            self._check("steps", self.steps >= 1, "at least 1")
        if self.epochs is not None:
            self._check("epochs", 0 < self.epochs < math.inf, "a finite number above 0")
        if self.method == "full" and self.dtype != "float32":
            # A bfloat16 weight keeps 8 bits: an update below 1/256 of it is rounded away, which is
            # most of them at the rates of full fine-tuning. The selection methods keep float32
            # masters of what they train.
            raise ValueError(
                f"piece_ops.Settings: method full needs dtype float32, got {self.dtype}"
            )
        if self.reference != "self" and self.method != "piece-g":
            raise ValueError(
                f"piece_ops.Settings: reference belongs to piece-g, got method {self.method}"
            )
        if self.xi is not None and self.method != "piece-s":
            raise ValueError(f"piece_ops.Settings: xi belongs to piece-s, got method {self.method}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(
                f"piece_ops.Settings: {name} must be one of {', '.join(allowed)}, got {value!r}"
            )

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(
                f"piece_ops.Settings: {name} must be {wanted}, got {getattr(self, name)}"
            )

    @property
    def is_sparse(self) -> bool:
        """Whether only selected weights are trained."""
        return self.method in METHODS

    def step_count(self, rows: int) -> int:
        """Return the optimizer steps of a task: `steps`, or `epochs` (default 3) passes."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 3) * rows / (self.batch_size * self.accumulation)))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Settings:
        """Make settings of what `as_dict` returned, or a results file (also an older one) holds."""
        return cls(**{**value, "lm_eval": tuple(value.get("lm_eval", ()))})

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for the results file."""
        return {**asdict(self), "lm_eval": list(self.lm_eval)}
