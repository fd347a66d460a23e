"""Importance the plain way: sums in a loop, all scores in one sorted tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from piece_ops.selection import Selection

from helpers.tiny_models import batch

BATCHES = [batch(3, 7, seed=1), batch(2, 5, seed=2)]
OTHER_BATCHES = [batch(4, 6, seed=3)]


def rows_of(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value[row : row + 1] for key, value in one.items()}
        for one in batches
        for row in range(len(one["input_ids"]))
    ]


def plain_sums(model: nn.Module, samples: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Sum of gradients and of their squares in float32, the plain way."""
    sums = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    squares = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for sample in samples:
        model.zero_grad()
        model(**sample).loss.backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.float()
            sums[name] += gradient
            squares[name] += gradient * gradient
    model.zero_grad()
    return sums, squares


def plain_top(scores: dict[str, torch.Tensor], k: int) -> tuple[dict[str, torch.Tensor], float]:
    """The k largest, equal ones by position; and the smallest of them."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.sort(flat, descending=True, stable=True).indices[:k]
    start, result = 0, {}
    for name, score in scores.items():
        inside = chosen[(chosen >= start) & (chosen < start + score.numel())] - start
        if inside.numel():
            result[name] = inside.sort().values
        start += score.numel()
    return result, float(flat[chosen[-1]])


def assert_same(selection: Selection, indices: dict[str, torch.Tensor]) -> None:
    assert list(selection.indices) == list(indices)
    for name, positions in indices.items():
        assert torch.equal(selection.indices[name], positions), name


def embedding_names(model: nn.Module) -> set[str]:
    owned = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {name for name, p in model.named_parameters() if id(p) in owned}
