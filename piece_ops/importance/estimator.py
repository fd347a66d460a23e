"""Which parameters matter for a task: streamed gradient statistics and the selection from them.

`Importance` adds up what its method needs of every sample's own gradient, mostly from one backward
pass of a whole batch, and `Importance.select` ranks all candidates at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from piece_ops.functional import Score, select_topk
from piece_ops.importance.candidates import Candidates, find_candidates
from piece_ops.importance.passes import LossFunction
from piece_ops.importance.scores import NEEDS, RANKED_BY, Numbers, scores_of, totals_of
from piece_ops.importance.self_texts import ROWS_OF_A_BATCH, self_texts
from piece_ops.importance.sources import show_progress, sources_of, wanted_k
from piece_ops.importance.statistics import DTYPES, WHERE, Statistics
from piece_ops.importance.statistics_file import StatisticsFile, write_statistics
from piece_ops.selection import Selection, check_positions

METHODS = tuple(NEEDS)


class Importance(Statistics):
    """Gradient statistics of a model over a task's samples, and the selection they give.

    With g_n the gradient of sample n's own loss (n = 1..N) and w the weights:

    ==========  ==========================================================  =====================
    method      score                                                       float32 accumulators
    ==========  ==========================================================  =====================
    piece-f     mean g^2, the diagonal empirical Fisher F                   1 per candidate
    piece-s     abs(mean g) / sqrt(F + xi)                                  2
    piece-g     abs(mean g) / (F_ref + mean of F_ref over all candidates)   2
    gradient    abs(mean g)                                                 1
    snip        abs(mean g * w)                                             1
    taylor      F * w^2                                                     1
    magnitude   abs(w)                                                      none, no data needed
    random      uniform, from `seed`                                        none, no data needed
    ==========  ==========================================================  =====================

    Parameters
    ----------
    model : nn.Module
        Any model. Passes run in the mode it is in: call ``model.eval()`` for gradients without
        dropout. Its gradients, flags and hooks are left as they were.
    method : str
        One of `METHODS`.
    loss_fn : callable, optional
        ``loss_fn(model, batch)`` returning one loss; default ``model(**batch).loss``.
    per_sample : bool or "loop"
        True: each row of a batch is one sample (and each sequence packed into a row, where
        ``position_ids`` begin again at 0; the label of its first token is ignored). One backward
        of the whole batch gives every sample's own gradients; see Notes. "loop": one backward
        per sample, on its row alone (right padding is cut off first, unless `loss_fn` is given).
        False: one backward per batch, whose gradient is then that of one sample.
    include, exclude : str, compiled regular expression, or iterable of those
        Names, fnmatch patterns or regular expressions (searched) of the candidates. A pattern
        that matches no parameter is an error.
    embeddings : bool
        Let input embeddings (and an output head tied to them) be candidates. They are counted in
        `total` either way. Frozen parameters are never candidates.
    reference : optional
        piece-g only: what must be kept. Batches, ``"self"`` (texts the model samples itself), an
        `Importance` with square sums, the path of a saved one, or a list of such sources, each of
        which enters as one mean. Used by `run_reference`, at the latest in `select`.
    reference_samples, reference_tokens : int
        Number and greatest length of the texts for ``"self"``, 32 of 64 tokens by default.
    xi : float, optional
        piece-s only, on the scale of the mean: default 1/N, which is the 1 that the released PIECE
        code adds to the sum. The smaller, the more consistent gradients beat large ones.
    compat : None or "official"
        ``"official"`` (piece-f and piece-s) follows the released code: scores on sums with 1
        added, one backward per batch as it comes, candidates by name (no "embed" in it), N over
        trainable parameters. It differs in two points: sums are float32 (there: the model's
        dtype), and a NaN raises (there: becomes 0).
    accumulators : "float32" or "bfloat16"
        bfloat16 halves the memory of the sums. What is added is rounded up or down at random, in
        proportion, by a hash of `seed`, sample, parameter and position: so sums of any length are
        right in the mean, and the same in every run. ``python -m bench importance --only
        accumulators`` measures what it does to a selection.
    seed : int
        For random, for the texts of ``"self"``, and for rounding.

    Notes
    -----
    A sample's gradient is that of its own loss, as if its row were a batch of its own. How a
    batch's loss is made of these is found by number on the first batch of each kind, by running
    two of its rows together and alone: a mean over the answer tokens, as ``model(**batch).loss``
    is (a sample with c of all C tokens enters with c / C, so its gradient is multiplied by C / c),
    a mean over rows (by their number), or a sum (by 1). Where it is neither (a contrastive or load
    balancing loss, dropout), the batch goes by the loop; batch norm in training mode is an error.

    Parameters that no rule covers go by the loop, the others do not; `looped` tells which and why.
    Noticed are parameters used outside their own modules or with gradient hooks, tensors without
    one part per sample, and values changed in place. A coupling that changes a sample's gradient
    by less than 1e-3 of it (in half precision 5 %, and 20 % where no two samples of a batch have
    as many answer tokens) is not noticed, nor one that the first batch of its kind does not show.

    A non-finite loss raises before its batch is added (with "loop": its sample). A non-finite
    gradient raises and names sample and parameter; gradients of that backward that came earlier
    have then been added, so the statistics are spoiled: everything but `reset` raises from there.
    So does a product, a square or a sum that overflows float32, found after its batch.

    Examples
    --------
    >>> import torch, piece_ops
    >>> layer = torch.nn.Linear(3, 2)
    >>> importance = piece_ops.Importance(
    ...     layer, "piece-f", loss_fn=lambda model, batch: model(batch["x"]).square().mean()
    ... )
    >>> importance.update({"x": torch.randn(5, 3)})
    >>> importance.sample_count, importance.select(k=2).k
    (5, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "piece-f",
        *,
        loss_fn: LossFunction | None = None,
        per_sample: bool | str = True,
        include: Any = None,
        exclude: Any = None,
        embeddings: bool = False,
        reference: Any = None,
        reference_samples: int = 32,
        reference_tokens: int = 64,
        xi: float | None = None,
        compat: str | None = None,
        accumulators: str = "float32",
        seed: int = 0,
    ) -> None:
        _check_settings(method, xi, compat, reference, per_sample)
        if accumulators not in DTYPES:
            raise ValueError(
                f"{WHERE}: accumulators must be 'float32' or 'bfloat16', got {accumulators!r}"
            )
        official = compat == "official"
        candidates = find_candidates(
            model,
            include=include,
            exclude=exclude,
            embeddings=embeddings,
            official=official,
            where=WHERE,
        )
        self._texts = (reference_samples, reference_tokens)
        self._written: list[Any] | None = None  # the texts for "self", if they are to be kept
        self._sources = sources_of(reference, Importance, WHERE)
        self._xi, self._compat = xi, compat
        super().__init__(
            model,
            candidates,
            method=method,
            per_sample=False if official else per_sample,
            loss_fn=loss_fn,
            accumulators=accumulators,
            seed=seed,
        )

    def reset(self) -> None:
        """Forget all statistics, of the task and of the reference."""
        super().reset()
        self._sources_run = 0

    def run_reference(self, progress: bool = False) -> None:
        """Work through the sources given as ``reference=`` (once; `select` does it if need be)."""
        while self._sources_run < len(self._sources):
            source = self._sources[self._sources_run]
            if isinstance(source, Importance):
                self.add_reference(source)
            elif source == "self":
                # The model's own text has the model's own loss.
                batches = -(-self._texts[0] // ROWS_OF_A_BATCH)
                texts = show_progress(self._self_texts(), "self texts", progress, batches)
                self._run_source(texts, None)
            elif isinstance(source, (str, os.PathLike)):
                self.add_reference(Importance._load(source, self.model, only=self._candidates))
            else:
                self._run_source(show_progress(source, "reference", progress), self._loss_fn)
            self._sources_run += 1

    def _self_texts(self) -> Iterable[Any]:
        if self._written is not None:
            return self._written
        samples, tokens = self._texts
        return self_texts(self.model, samples=samples, tokens=tokens, seed=self._seed, where=WHERE)

    def _run_source(self, batches: Iterable[Any], loss_fn: LossFunction | None) -> None:
        self.finish_reference()
        try:
            for batch in batches:
                self._add_reference_batch(batch, loss_fn)
        except BaseException as error:
            # What came before may not be repeatable, so a second try would count it wrongly.
            self._spoiled = self._spoiled or f"a reference stopped half way: {error}"
            raise
        if not self._reference_samples:
            raise ValueError(f"{WHERE}: a reference must have at least one batch, got none")
        self.finish_reference()

    # ---------------------------------------------------------------------------------- selecting

    def select(
        self,
        density: float | None = None,
        k: int | None = None,
        exclude_positions: Mapping[str, Tensor] | Selection | None = None,
    ) -> Selection:
        """Choose the k candidates with the largest score, over all parameters at once.

        Parameters
        ----------
        density : float in (0, 1]
            Chosen share of all N parameters: k = max(1, int(density * N)).
        k : int in 0..candidates
            Their number. Exactly one of the two must be given.
        exclude_positions : Selection, or dict of str to Tensor of int64, optional
            Coordinates that must not be chosen.

        Returns
        -------
        Selection
            Equal scores: the earlier parameter, then the smaller position. Its threshold is on
            the scale of the formulas above, of means over samples (compat: of sums).
        """
        where = f"{WHERE}.select"
        self._check_sound(where)
        wanted, excluded = self._request(density, k, exclude_positions, where)
        if NEEDS[self.method].data and not self._samples:
            raise ValueError(f"{where}: at least one sample is needed, got none; call update()")
        numbers, reference_samples = self._numbers(where)
        mean = 0.0
        if NEEDS[self.method].reference:
            mean = math.fsum(totals_of(numbers["reference"])) / self.candidate_count
        scores, scale = self._scores(numbers, self._samples, reference_samples, mean)
        top = select_topk(scores, wanted, exclude=excluded or None, maxima=self._maxima)
        return self._selection(top.indices, float(top.threshold) * scale)

    def _smallest_constant(self) -> float:
        # As in `scores_of`, for the samples so far: with more, xi times their number only grows.
        if self._method != "piece-s":
            return 0.0
        return 1.0 if self._xi is None else self._xi * max(1, self._samples)

    def _request(
        self,
        density: float | None,
        k: int | None,
        exclude_positions: Mapping[str, Tensor] | Selection | None,
        where: str,
    ) -> tuple[int, dict[str, Tensor]]:
        """The number of coordinates to choose and those that must not be, checked."""
        wanted = wanted_k(density, k, self.total, where)
        excluded = self._excluded(exclude_positions, where)
        room = self.candidate_count - sum(p.numel() for p in excluded.values())
        if not 0 <= wanted <= room:
            raise ValueError(
                f"{where}: k must be in 0..{room} (the candidates; {self.total} parameters in "
                f"all), got {wanted}"
            )
        return wanted, excluded

    def _numbers(self, where: str) -> tuple[dict[str, dict[str, Tensor]], int]:
        """What the method ranks by, and the number of samples its reference is summed over."""
        reference: dict[str, Tensor] = {}
        reference_samples = 1
        if NEEDS[self.method].reference:
            self.run_reference()
            reference, reference_samples = self._reference_statistics(where)
        held = {
            "weights": {name: self._weight(name).detach() for name in self.names},
            "sums": self._sums,
            "square_sums": self._square_sums,
            "reference": reference,
        }
        return {kind: held[kind] for kind in RANKED_BY[self.method]}, reference_samples

    def _scores(
        self, numbers: Numbers, samples: int, reference_samples: int, reference_mean: float
    ) -> tuple[Score | dict[str, Tensor], float]:
        return scores_of(
            self.method,
            numbers,
            samples=samples,
            reference_samples=reference_samples,
            reference_mean=reference_mean,
            xi=self._xi,
            official=self._compat == "official",
            seed=self._seed,
            where=f"{WHERE}.select",
        )

    def _selection(self, indices: Mapping[str, Tensor], threshold: float) -> Selection:
        return Selection(
            indices={n: i.to("cpu") for n, i in indices.items() if i.numel()},
            shapes={n: tuple(p.shape) for n, p in self._candidates.parameters.items()},
            total=self.total,
            method=self.method,
            threshold=threshold,
        )

    def _excluded(
        self, given: Mapping[str, Tensor] | Selection | None, where: str
    ) -> dict[str, Tensor]:
        """Excluded positions of the candidates; names of other parameters are no matter."""
        positions = given.indices if isinstance(given, Selection) else dict(given or {})
        known = dict(self.model.named_parameters())
        for name, tensor in positions.items():
            if name not in known:
                raise ValueError(f"{where}: exclude_positions names no parameter: {name!r}")
            check_positions(tensor, known[name].numel(), name, where)
        return {name: positions[name] for name in self.names if name in positions}

    # -------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics to a safetensors file, atomically: 4 bytes per sum."""
        self._check_sound(f"{WHERE}.save")
        settings = {
            "method": self._method,
            "per_sample": self._per_sample,
            "xi": self._xi,
            "compat": self._compat,
            "seed": self._seed,
            "accumulators": str(self._dtype).removeprefix("torch."),
        }
        write_statistics(path, self, settings)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, *, loss_fn: LossFunction | None = None
    ) -> Importance:
        """Read a file of `save`, for a model with the same parameters (names and shapes).

        Its candidates are those of the file; sources of ``reference=`` that had not run yet are
        not in it.

        Raises
        ------
        FileNotFoundError, ValueError
            No such file; truncated, damaged or of another version; parameters that the model
            lacks or has in another shape (the message lists them).
        """
        return cls._load(path, model, loss_fn=loss_fn)

    @classmethod
    def _load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        loss_fn: LossFunction | None = None,
        only: Candidates | None = None,
    ) -> Importance:
        """`load`, of some of the parameters only, or of some of their rows."""
        file = StatisticsFile(path, model, f"{WHERE}.load", only)
        settings = file.settings
        self = cls.__new__(cls)
        self._texts, self._sources, self._written = (32, 64), [], None
        self._xi, self._compat = settings["xi"], settings["compat"]
        Statistics.__init__(
            self,
            model,
            file.candidates,
            method=settings["method"],
            per_sample=settings["per_sample"],
            loss_fn=loss_fn,
            accumulators=settings["accumulators"],
            seed=int(settings["seed"]),
        )
        file.fill(self)
        return self


def _check_settings(
    method: str, xi: float | None, compat: str | None, reference: Any, per_sample: bool | str
) -> None:
    if per_sample not in (True, False, "loop"):
        raise ValueError(f"{WHERE}: per_sample must be True, False or 'loop', got {per_sample!r}")
    if method not in NEEDS:
        raise ValueError(f"{WHERE}: method must be one of {', '.join(METHODS)}, got {method!r}")
    if compat not in (None, "official"):
        raise ValueError(f"{WHERE}: compat must be None or 'official', got {compat!r}")
    if compat and method not in ("piece-f", "piece-s"):
        raise ValueError(
            f"{WHERE}: compat='official' exists for piece-f and piece-s, got {method!r}"
        )
    if xi is not None and (method != "piece-s" or compat):
        raise ValueError(f"{WHERE}: xi belongs to piece-s without compat, got xi={xi}")
    if xi is not None and not 0.0 < xi < float("inf"):
        raise ValueError(f"{WHERE}: xi must be positive and finite, got {xi}")
    if reference is not None and not NEEDS[method].reference:
        raise ValueError(f"{WHERE}: reference belongs to piece-g, got it for {method!r}")
