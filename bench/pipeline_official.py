"""PIECE as its authors' released code goes about it: what a user of it waits for.

Sums of gradients and of squares in the model's dtype, bfloat16; a file per tensor for the sums, the
squares and the scores; all scores of the model read back as float32, embeddings' zeroed, and
concatenated on the CPU, two copies; one torch.topk; every index unravelled by itself into a JSON
list per tensor; dense masks, written entry by entry from the JSON, which hooks multiply gradients
with; AdamW of all weights but the frozen embeddings. A tensor without a selected weight gets no
JSON, therefore a mask of ones, and trains whole. (Its optimizer runs on the CPU beside a GPU and
clips gradients' norms; here it is torch.optim.AdamW at this benchmark's rates, and nothing clips.)
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.bench_training_step import RATES, n_bytes
from bench.pipeline_way import DENSITY, Batch, Positions, Way

OFFICIAL = "PIECE as released"


class Official(Way):
    name = OFFICIAL
    note = "bfloat16; its files are written and read"
    cheap_select = False
    may_differ = True
    same_first_loss = 2e-2  # bfloat16

    def __init__(self, model: Any) -> None:
        super().__init__(model.to(torch.bfloat16))

    def importance(self, batches: list[Batch]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                self.model(**{key: batch[key][row : row + 1] for key in batch}).loss.backward()
                for name, weight in self.model.named_parameters():
                    grad = torch.nan_to_num(weight.grad, nan=0.0, posinf=0.0, neginf=0.0)
                    if name in self.sums:
                        self.sums[name].add_(grad)
                        self.squares[name].add_(grad**2)
                    else:
                        self.sums[name], self.squares[name] = grad.clone(), grad**2
                self.model.zero_grad()

    def select(self, folder: Path) -> Positions:
        names, shapes, scores = list(self.sums), [], []
        for name in names:
            torch.save(self.sums[name], folder / f"{name}.sum.pt")
            torch.save(self.squares[name], folder / f"{name}.squares.pt")
        for name in names:
            total = torch.load(folder / f"{name}.sum.pt").abs()
            squares = torch.load(folder / f"{name}.squares.pt")
            torch.save(total / torch.sqrt(squares + 1), folder / f"{name}.score.pt")
        for name in names:
            score = torch.load(folder / f"{name}.score.pt").float()
            if "embed" in name:
                score.zero_()
            shapes.append(tuple(score.shape))
            scores.append(score.reshape(-1))
        merged = torch.nan_to_num(
            torch.cat(scores).clone(), nan=0.0, posinf=float("inf"), neginf=-float("inf")
        )
        best = merged.topk(max(1, int(merged.numel() * DENSITY))).indices.numpy()
        ends = np.cumsum([score.numel() for score in scores])
        tensors = np.searchsorted(ends, best, side="right")
        lists: dict[str, list[list[int]]] = {}
        for index, tensor in zip(best, tensors, strict=True):
            local = index - (ends[tensor] - scores[tensor].numel())
            position = np.unravel_index(local, shapes[tensor])
            lists.setdefault(names[tensor], []).append([int(x) for x in position])
        for name, entries in lists.items():
            (folder / f"{name}.json").write_text(json.dumps({"positions": entries}))
        self.lists = lists
        weights = dict(zip(names, shapes, strict=True))
        return {name: _flat(entries, weights[name]) for name, entries in lists.items()}

    def set_up(self, chosen: Positions, folder: Path) -> None:
        del self.sums, self.squares
        self.masks, trained = [], []
        for name, weight in self.model.named_parameters():
            if "embed" in name:
                weight.requires_grad_(False)
                continue
            mask = torch.zeros_like(weight, requires_grad=False)
            file = folder / f"{name}.json"
            if file.exists():
                for position in json.loads(file.read_text())["positions"]:
                    mask[tuple(position)] = 1.0
            else:
                mask.fill_(1.0)
                self.whole.add(name)
            weight.register_hook(partial(torch.mul, mask))
            self.masks.append(mask)
            trained.append(weight)
        self.optimizer = torch.optim.AdamW(trained, fused=True, **RATES)

    def state_bytes(self) -> int:
        return super().state_bytes() + n_bytes(self.masks)


def _flat(entries: list[list[int]], shape: tuple[int, ...]) -> Tensor:
    """Row-major positions of coordinates (for comparison with other ways: about a millisecond)."""
    flat = np.ravel_multi_index(tuple(np.array(entries).T), shape)
    return torch.from_numpy(flat).sort().values
