"""The whole pipeline in plain PyTorch: three ways to mask, FISH-mask's, and full fine-tuning.

The three select by piece-s: 16 backward passes, whose hooks add every candidate's gradient up and
free it. Tensors without a selected weight are frozen, which saves their weight gradients. AdamW is
the fused one (foreach takes 6 % longer a step with dense masks).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.bench_training_step import RATES, n_bytes
from bench.pipeline_way import DENSITY, Batch, Positions, Way, moments

MULTIPLY = "torch: masks x gradients, AdamW"
HOOKS = "torch: mask hooks, AdamW"
GATHER = "torch: index gather, AdamW of k"
FISH = "FISH-mask's procedure"
FULL = "full fine-tuning"
MASKINGS = (MULTIPLY, HOOKS, GATHER)


def split_positions(flat: Tensor, sizes: dict[str, int]) -> Positions:
    """Positions in the concatenation of all tensors, as positions in each."""
    flat, found, start = flat.sort().values, {}, 0
    for name, size in sizes.items():
        low, high = torch.searchsorted(flat, torch.tensor([start, start + size])).tolist()
        if high > low:
            found[name] = flat[low:high] - start
        start += size
    return found


def dense_masks(weights: dict[str, Tensor], chosen: Positions) -> list[Tensor]:
    masks = []
    for name, weight in weights.items():
        mask = torch.zeros_like(weight, requires_grad=False)
        if name in chosen:
            mask.view(-1)[chosen[name]] = 1.0
        masks.append(mask)
    return masks


class Masking(Way):
    """What the three have in common: scores, torch.topk, which tensors train."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        named = dict(model.named_parameters())
        self.candidates = {name: named[name] for name in named if "embed" not in name}
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.total = sum(weight.numel() for weight in named.values())

    def importance(self, batches: list[Batch]) -> None:
        self.sums = {n: torch.zeros_like(w.data) for n, w in self.candidates.items()}
        self.squares = {n: torch.zeros_like(w.data) for n, w in self.candidates.items()}

        def add(name: str, weight: Tensor) -> None:
            self.sums[name].add_(weight.grad)
            self.squares[name].addcmul_(weight.grad, weight.grad)
            weight.grad = None

        self.model.requires_grad_(False)
        hooks = []
        for name, weight in self.candidates.items():
            weight.requires_grad_()
            hooks.append(weight.register_post_accumulate_grad_hook(partial(add, name)))
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                self.model(**{key: batch[key][row : row + 1] for key in batch}).loss.backward()
        for hook in hooks:
            hook.remove()

    def select(self, folder: Path) -> Positions:
        parts = [
            self.sums[name].abs().div_((self.squares[name] + 1).sqrt_()).view(-1)
            for name in self.candidates
        ]
        k = int(DENSITY * self.total)
        best = torch.cat(parts).topk(k, sorted=False).indices
        return split_positions(best, {n: w.numel() for n, w in self.candidates.items()})

    def set_up(self, chosen: Positions, folder: Path) -> None:
        self.sums, self.squares = {}, {}
        self.model.requires_grad_(False)
        self.trained = {name: self.candidates[name] for name in chosen}
        for weight in self.trained.values():
            weight.requires_grad_()
        self.prepare(chosen)

    def prepare(self, chosen: Positions) -> None:
        raise NotImplementedError


class Multiply(Masking):
    """Dense gradients times 0/1 masks between backward and step."""

    name = MULTIPLY

    def prepare(self, chosen: Positions) -> None:
        self.masks = dense_masks(self.trained, chosen)
        self.optimizer = torch.optim.AdamW(self.trained.values(), fused=True, **RATES)

    def step(self, data: Batch) -> Tensor:
        loss: Tensor = self.model(**data).loss
        loss.backward()
        torch._foreach_mul_([weight.grad for weight in self.trained.values()], self.masks)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def state_bytes(self) -> int:
        return super().state_bytes() + n_bytes(self.masks)


class Hooks(Multiply):
    """The same, each gradient masked as soon as it is there."""

    name, chooses_like = HOOKS, MULTIPLY
    step = Way.step

    def prepare(self, chosen: Positions) -> None:
        super().prepare(chosen)
        for weight, mask in zip(self.trained.values(), self.masks, strict=True):
            weight.register_post_accumulate_grad_hook(partial(self._mask, mask))

    @staticmethod
    def _mask(mask: Tensor, weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(mask)


class Gather(Masking):
    """Each dense gradient is read at the k_t positions and freed; AdamW of one flat parameter."""

    name, chooses_like = GATHER, MULTIPLY
    note = "saves positions and values; DDP reduces before its hooks"

    def prepare(self, chosen: Positions) -> None:
        self.chosen = chosen
        self.sizes = [positions.numel() for positions in chosen.values()]
        flat = [w.detach().view(-1)[chosen[name]] for name, w in self.trained.items()]
        self.flat = torch.nn.Parameter(torch.cat(flat))
        self.flat.grad = torch.zeros_like(self.flat)
        for (name, weight), part in zip(
            self.trained.items(), self.flat.grad.split(self.sizes), strict=True
        ):
            weight.register_post_accumulate_grad_hook(partial(self._take, chosen[name], part))
        self.optimizer = torch.optim.AdamW([self.flat], fused=True, **RATES)

    @staticmethod
    def _take(positions: Tensor, part: Tensor, weight: Tensor) -> None:
        assert weight.grad is not None
        torch.index_select(weight.grad.view(-1), 0, positions, out=part)
        weight.grad = None

    def step(self, data: Batch) -> Tensor:
        loss: Tensor = self.model(**data).loss
        loss.backward()
        self.optimizer.step()
        values = self.flat.detach().split(self.sizes)
        for (name, weight), part in zip(self.trained.items(), values, strict=True):
            weight.detach().view(-1).index_copy_(0, self.chosen[name], part)
        return loss.detach()

    def save(self, folder: Path) -> None:
        values = self.flat.detach().split(self.sizes)
        torch.save(
            {
                name: (positions.int(), part.clone())
                for (name, positions), part in zip(self.chosen.items(), values, strict=True)
            },
            folder / "values.pt",
        )

    def state_bytes(self) -> int:
        """With one dense gradient, the largest."""
        largest = max(weight.nbytes for weight in self.trained.values())
        positions = n_bytes(self.chosen.values())
        return 2 * self.flat.nbytes + largest + positions + moments(self.optimizer)


class Fish(Way):
    """Dense Fisher of all parameters, one top-k of the model, masks in the optimizer's step."""

    name = FISH
    note = "embeddings are candidates"
    may_differ = True

    def importance(self, batches: list[Batch]) -> None:
        named = dict(self.model.named_parameters())
        self.fisher = {name: torch.zeros_like(weight.data) for name, weight in named.items()}
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                self.model(**{key: batch[key][row : row + 1] for key in batch}).loss.backward()
                for name, weight in named.items():
                    self.fisher[name] += weight.grad**2
                self.model.zero_grad()

    def select(self, folder: Path) -> Positions:
        flat = torch.cat([part.view(-1) for part in self.fisher.values()])
        best = flat.topk(int(DENSITY * flat.numel()), sorted=False).indices
        return split_positions(best, {name: part.numel() for name, part in self.fisher.items()})

    def set_up(self, chosen: Positions, folder: Path) -> None:
        del self.fisher
        named = dict(self.model.named_parameters())
        self.masks = dense_masks(named, chosen)
        self.optimizer = MaskedAdamW(named.values(), self.masks)

    def state_bytes(self) -> int:
        return super().state_bytes() + n_bytes(self.masks)


class MaskedAdamW(torch.optim.AdamW):
    def __init__(self, weights: Any, masks: list[Tensor]) -> None:
        super().__init__(weights, fused=True, **RATES)
        self.masks = masks

    def step(self, closure: Any = None) -> Any:
        for weight, mask in zip(self.param_groups[0]["params"], self.masks, strict=True):
            weight.grad *= mask
        return super().step(closure)


class Full(Way):
    name, all_move = FULL, True

    def set_up(self, chosen: Positions, folder: Path) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **RATES)
