"""Memory and time of importance, selection and a training step, from the byte model of the ops.

Beside each stands what dense masking in plain PyTorch takes at least: a backward pass a sample and
a dense gradient for importance, one concatenated score array for torch.topk, and then gradient,
mask and two AdamW moments of every weight, all in the weights' dtype.

Not counted, on either side: attention scores, norms and activation functions, the loss, the
activations' memory, the optimizer's launches. On masking's side torch.topk counts as one read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from piece_ops.importance import METHODS
from piece_ops.importance.scores import NEEDS, RANKED_BY
from piece_ops.importance.self_texts import ROWS_OF_A_BATCH
from piece_ops.predict import costs
from piece_ops.predict.costs import Work
from piece_ops.predict.devices import Device
from piece_ops.predict.models import Model, Weight

SELF_TEXTS, SELF_TOKENS = 32, 64  # of `Importance`: the reference of piece-g
# A module run again on one sample: forward, gradients inside it, gradients of its weights.
RERUN_OPERATIONS = 6


@dataclass(frozen=True)
class Plan:
    """What is to be done: `samples` of `length` tokens give the importance, passes and steps take
    `tokens`, and `gpus` devices train data parallel, each on `tokens` of its own."""

    method: str = "piece-s"
    density: float = 1e-3
    dtype: torch.dtype = torch.bfloat16
    samples: int = 16
    length: int = 512
    tokens: int = 8192
    gpus: int = 1

    def __post_init__(self) -> None:
        where = "piece_ops.predict.Plan"
        if self.method not in METHODS:
            raise ValueError(f"{where}: method must be one of {METHODS}, got {self.method!r}")
        if not 0 < self.density <= 1:
            raise ValueError(f"{where}: density must be in (0, 1], got {self.density}")
        for name in ("samples", "length", "tokens", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}: {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Phase:
    """Seconds and bytes beyond weights and activations, here and with dense masks."""

    name: str
    ours: Work
    ours_bytes: float
    dense: Work
    dense_bytes: float


class Prediction:
    """All phases of a plan for a model on a device.

    Parameters
    ----------
    model : Model
    on : Device
    plan : Plan
        Selected are ``density * model.n`` entries, in proportion to size, of all tensors but input
        embeddings and an output head tied to them.

    Examples
    --------
    >>> import torch
    >>> from piece_ops.predict import Plan, Prediction, device, read_model
    >>> found = Prediction(read_model("llama-3-8b"), device("h200", torch.bfloat16), Plan())
    >>> [phase.name for phase in found.phases]
    ['importance', 'selection', 'training step']
    """

    def __init__(self, model: Model, on: Device, plan: Plan) -> None:
        self.model, self.on, self.plan = model, on, plan
        self.size = plan.dtype.itemsize
        self._candidates = [w for w in model.weights if w.kind in ("linear", "other")]
        self._general = [w for w in self._candidates if w.kind == "other"]
        self.candidates = sum(weight.n for weight in self._candidates)
        self.k = min(max(1, int(plan.density * model.n)), self.candidates)
        self.phases = (self._importance(), self._selection(), self._step())

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model."""
        return self.model.n * self.size

    @property
    def delta_bytes(self) -> int:
        """Bytes of a delta file: positions, old and new values."""
        return self.k * (4 + 2 * self.size)

    @property
    def reduced_bytes(self) -> tuple[int, int]:
        """What data parallelism reduces a step: k float32 numbers, or every weight's gradient."""
        return 4 * self.k, self.size * self.model.n

    def fisher_ratios(self) -> tuple[float, float]:
        """Seconds of piece-f's pass over an ordinary one's: with the forward, and backward alone.

        Over one batch of `tokens` in samples of `length`.
        """
        plan = self.plan
        together = max(1, plan.tokens // plan.length)
        forward = Work(products=2 * self.model.active * together * plan.length).seconds(self.on)
        ours = self._batched(together, plan.length, 1).seconds(self.on)
        return ours / (3 * forward), (ours - forward) / (2 * forward)

    def saved_bytes(self) -> tuple[float, float]:
        """What a step takes less than masking: at its least, and with float32 moments."""
        step = self.phases[-1]
        least = step.dense_bytes - step.ours_bytes
        return least, least + 2 * self.model.n * (4 - self.size)

    def link_seconds(self, n_bytes: float) -> float:
        """Of a ring all-reduce over the plan's devices."""
        gpus = self.plan.gpus
        if gpus == 1 or not self.on.link:
            return 0.0
        return 2 * (gpus - 1) / gpus * n_bytes / self.on.link

    # ------------------------------------------------------------------------------------- phases

    def _importance(self) -> Phase:
        need, plan = NEEDS[self.plan.method], self.plan
        own = need.sums + need.square_sums
        ours, dense = Work(), Work()
        if own:
            ours += self._batched(plan.samples, plan.length, own)
            dense += self._looped(plan.samples, plan.length, own)
        if need.reference:
            written = math.ceil(SELF_TEXTS / ROWS_OF_A_BATCH) * SELF_TOKENS  # tokens, one by one
            written_work = Work(read=written * self.weights_bytes)
            ours += self._batched(SELF_TEXTS, SELF_TOKENS, 1) + written_work
            dense += self._looped(SELF_TEXTS, SELF_TOKENS, 1) + written_work
        if not own:
            return Phase("importance", ours, 0, dense, 0)
        held = self._accumulators()
        return Phase(
            "importance", ours, held + self._largest_gradient(), dense, held + self.weights_bytes
        )

    def _accumulators(self) -> int:
        """Bytes of the float32 sums, which are held until the selection is made."""
        need = NEEDS[self.plan.method]
        return 4 * (need.sums + need.square_sums + need.reference) * self.candidates

    def _batched(self, samples: int, length: int, accumulators: int) -> Work:
        """`Importance`: one backward of a batch gives every sample's squares."""
        together = min(samples, max(1, self.plan.tokens // length))
        passes = math.ceil(samples / together)
        tokens = samples * length
        work = Work(products=4 * self.model.active * tokens)
        for weight in self._candidates:
            if weight.kind == "linear":
                out, width = weight.shape
                share = tokens / passes
                one = costs.accumulate_per_sample_squares(
                    share, out, width, self.size, accumulators, self.on
                )
                work += one * (weight.count * passes)
            else:  # its module runs again on every sample, and makes a dense gradient
                if weight.is_multiplied:
                    work += Work(products=RERUN_OPERATIONS * weight.n * weight.active * tokens)
                added = costs.accumulate_squares(weight.n, self.size, accumulators, weight.count)
                work += (Work(moved=self.size * weight.n) + added) * samples
        return work

    def _looped(self, samples: int, length: int, accumulators: int) -> Work:
        """Plain PyTorch: a backward a sample, whose dense gradients are squared and added."""
        products = Work(products=6 * self.model.active * samples * length)
        return products + costs.dense_squares(self.candidates, self.size, accumulators) * samples

    def _selection(self) -> Phase:
        kinds = RANKED_BY[self.plan.method]
        inputs = sum(self.size if kind == "weights" else 4 for kind in kinds)
        if self.plan.method == "random":
            inputs = 0
        n, tensors = self.candidates, sum(weight.count for weight in self._candidates)
        ours = costs.select_topk(n, self.k, inputs, self.on, tensors)
        if "reference" in kinds:
            ours += costs.total(n, 4, tensors)
        held = self._accumulators()
        return Phase(
            "selection",
            ours,
            held + costs.select_topk_scratch(n, self.k, self.on),
            costs.dense_selection(n, inputs, self.size),
            held + 4 * n + self.weights_bytes,
        )

    def _step(self) -> Phase:
        plan, n = self.plan, self.model.n
        through = Work(products=4 * self.model.active * plan.tokens)
        ours = through
        for weight, k in self._chosen():
            if weight.kind == "linear":
                out, width = weight.shape
                each = k / weight.count
                ours += weight.count * costs.sampled_weight_grad(
                    plan.tokens, out, width, self.size, each, self.on
                )
            else:  # a dense gradient, one tensor at a time, of which k entries are read
                if weight.is_multiplied:
                    ours += Work(products=2 * weight.n * weight.active * plan.tokens)
                ours += Work(moved=self.size * weight.n)
                ours += costs.gather(k, self.size, self.on, weight.count)
        tensors = sum(weight.count for weight in self._candidates)
        ours += costs.sparse_adamw(self.k, self.on, tensors)
        dense = Work(products=6 * self.model.active * plan.tokens)
        dense += costs.masked_adamw(n, self.size)
        few, many = (Work(wait=self.link_seconds(b)) for b in self.reduced_bytes)
        # Masters, their gradients, two moments, positions here and in the copied columns, and the
        # values to revert to.
        held = self.k * (4 + 4 + 8 + 8 + 8 + self.size)
        return Phase(
            "training step",
            ours + few,
            held + self._largest_gradient(),
            dense + many,
            4 * self.weights_bytes,
        )

    def _chosen(self) -> Iterator[tuple[Weight, float]]:
        for weight in self._candidates:
            yield weight, self.k * weight.n / self.candidates

    def _largest_gradient(self) -> int:
        """Bytes of the largest dense gradient that exists at a time."""
        return max((w.n // w.count * self.size for w in self._general), default=0)
