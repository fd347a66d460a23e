"""What the samples of a batch are: its rows, or the sequences packed into its rows.

A batch is packed when its ``position_ids`` [rows, tokens] begin again at 0 inside a row; each such
sequence is then one sample, and the label of its first token, which no token of its own predicts,
is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tensors with one column per token that can lose right padding together with attention_mask.
_TOKEN_WISE = (
    "input_ids",
    "attention_mask",
    "labels",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
)
# What some collators add for packed batches; it describes all sequences, so no single one.
_OF_ALL_SEQUENCES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Grid:
    """Where samples lie: one row each, or (packed) a range of one row's tokens each."""

    rows: int
    tokens: int = 0  # in a row; only of packed batches
    spans: tuple[tuple[int, int, int], ...] = ()  # packed: row, first token and end of each sample

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.spans) or self.rows


@dataclass(frozen=True)
class Samples:
    """A batch, where its samples lie, and each of them as a batch of its own (views)."""

    batch: Any
    grid: Grid
    parts: list[Any]
    trim: bool

    @property
    def alone(self) -> list[Any]:
        """Every sample without its right padding, if it may be cut."""
        return [_trim(part) for part in self.parts] if self.trim else self.parts

    def take(self, chosen: Sequence[int]) -> Samples:
        """The batch of some of the rows; a packed batch stays whole."""
        if self.grid.spans:
            return self
        places = torch.tensor(chosen)

        def pick(value: Any) -> Any:
            is_cut = isinstance(value, Tensor) and value.shape[:1] == (self.grid.rows,)
            return value[places.to(value.device)] if is_cut else value

        batch = _map_batch(self.batch, pick)
        return Samples(batch, Grid(len(chosen)), [self.parts[n] for n in chosen], self.trim)


def is_batch(value: Any) -> bool:
    """A mapping, a tensor, or a list or tuple of tensors."""
    if isinstance(value, (Mapping, Tensor)):
        return True
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Tensor) for item in value)
    )


def samples_of(batch: Any, *, trim: bool, where: str) -> Samples:
    """Find the samples of a batch.

    Every tensor whose first dimension is the number of rows is cut; everything else is passed on
    as it is. The number of rows is that of ``input_ids``, or of the first tensor that has a
    dimension. With `trim`, right padding is cut off (see `_trim`).
    """
    if not is_batch(batch):
        raise TypeError(
            f"{where}: a batch must be a dict of tensors (or a tensor, or a list of tensors, with "
            f"loss_fn), got {type(batch).__name__}"
        )
    items: list[tuple[Any, Any]]
    if isinstance(batch, Mapping):
        items = list(batch.items())
    else:
        items = list(enumerate([batch] if isinstance(batch, Tensor) else batch))
    tensors = [(key, value) for key, value in items if isinstance(value, Tensor) and value.dim()]
    sizes = {key: value.shape[0] for key, value in tensors}
    rows = sizes.get("input_ids", next(iter(sizes.values()), 0))
    if rows == 0:
        raise ValueError(f"{where}: a batch must have at least one row, got none")
    spans = _spans(batch)
    trim = trim and isinstance(batch, Mapping)
    if spans:
        return _packed(dict(batch), spans, trim)
    if trim:
        batch = _trim(dict(batch))
    parts = [
        _map_batch(
            batch,
            lambda v, n=row: (
                v[n : n + 1] if isinstance(v, Tensor) and v.shape[:1] == (rows,) else v
            ),
        )
        for row in range(rows)
    ]
    return Samples(batch, Grid(rows), parts, trim)


def _map_batch(batch: Any, change: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: change(value) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return change(batch)
    return type(batch)(change(value) for value in batch)


def _spans(batch: Any) -> tuple[tuple[int, int, int], ...]:
    """Row, first token and end of every packed sequence; empty for an ordinary batch."""
    if not isinstance(batch, Mapping):
        return ()
    positions, ids = batch.get("position_ids"), batch.get("input_ids")
    if not isinstance(positions, Tensor) or not isinstance(ids, Tensor):
        return ()
    if positions.dim() != 2 or positions.shape != ids.shape:
        return ()
    begins = positions == 0
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:  # padding begins no sequence
        begins &= mask != 0
        begins[:, 1:] &= mask[:, :-1] != 0
    begins[:, 0] = True
    if int(begins.sum()) == ids.shape[0]:
        return ()
    places = begins.nonzero().tolist()
    following = [*places[1:], [-1, -1]]
    return tuple(
        (row, first, following[n][1] if following[n][0] == row else ids.shape[1])
        for n, (row, first) in enumerate(places)
    )


def _packed(batch: dict[str, Any], spans: tuple[tuple[int, int, int], ...], trim: bool) -> Samples:
    rows, tokens = batch["input_ids"].shape
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == (rows, tokens):
        labels = labels.clone()
        for row, first, _ in spans:
            labels[row, first] = -100
        batch["labels"] = labels

    def cut(value: Any, row: int, first: int, end: int) -> Any:
        if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
            return value
        part = value[row : row + 1]
        return part[:, first:end] if value.shape[:2] == (rows, tokens) else part

    parts = [
        {key: cut(v, *span) for key, v in batch.items() if key not in _OF_ALL_SEQUENCES}
        for span in spans
    ]
    return Samples(batch, Grid(rows, tokens, spans), parts, trim)


def _trim(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut off the columns that are padding in every row: exact for a causal model, and cheaper.

    Only where it can change nothing: `attention_mask` is [rows, L] and ends in zeros, the labels
    there are -100, and the other token-wise tensors have length L. Left padding stays.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or "decoder_input_ids" in batch:
        return batch
    length = mask.shape[1]
    kept = torch.nonzero(mask.any(0))
    end = int(kept[-1]) + 1 if kept.numel() else length
    names = [name for name in _TOKEN_WISE if isinstance(batch.get(name), Tensor)]
    if end == length or any(batch[name].shape[1:2] != (length,) for name in names):
        return batch
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and bool((labels[:, end:] != -100).any()):
        return batch
    return {**batch, **{name: batch[name][:, :end] for name in names}}
