"""A training step of SmolLM2-135M with 0.1 % of its weights, against dense gradients and masks.

4 x 128 tokens: forward, backward, update. With N = 134.5 M weights in matrices, forward takes 2 N
operations a token and gradients of the inputs 2 N, which every way pays. Masking, as it is usually
done, adds 2 N for weight gradients, moves 12 bytes a weight for the masks and 28 for AdamW. So
sampling can be expected below 4 N / 6 N = 0.67 of the products' time; attention and the loss, the
same for all, dilute it. Where the embedding (28.3 M, also the output head) has no selected weight,
masking may freeze it and pays 2 (N - 28.3 M): 0.72 of the products' time at best.

Memory beyond weights and activations is what is held from step to step, in bytes of tensors, and
by how much the peak of a step, as the dispatcher sees it, exceeds that of a step which drops every
dense gradient at once and updates nothing. What backward needs of inputs counts as activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import piece_ops
from bench.allocations import Allocations
from bench.harness import Absent, Case, Peer, Row, Target, time_ratio
from piece_ops._taps import TAP

OURS = "piece_ops"
MASKED = "torch: mask gradients, AdamW(fused)"
PARTLY = "the same, unselected tensors frozen"
FROZEN = "forward, gradients of inputs only"
RATES = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "smollm2-135m-instruct"


def load(quick: bool, dtype: torch.dtype) -> Any:
    """SmolLM2-135M as the demo stores it, or a small model like it."""
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Absent(str(error)) from None
    if quick:
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(dtype).train()
    if not FOLDER.exists():
        raise Absent(f"no model in {FOLDER}; `make demo` puts it there")
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).train()


def tokens(quick: bool) -> Tensor:
    """Four rows of 128: real text, so that piece-s chooses as it does in use."""
    if quick:
        return torch.randint(1000, (2, 16), generator=torch.Generator().manual_seed(0))
    from transformers import AutoTokenizer

    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt")["input_ids"]
    return ids[0, : 4 * 128].view(4, 128)  # type: ignore[no-any-return]


def n_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Sampled:
    """Ours."""

    def __init__(self, model: nn.Module, selection: piece_ops.Selection) -> None:
        self.model = piece_ops.PieceModel(model, selection)
        self.optimizer: Any = piece_ops.SparseAdamW(self.model.parameters(), **RATES)

    def step(self, data: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**data).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def held_bytes(self) -> int:
        """Values, their gradients, positions, what the taps know, moments."""
        values = list(self.model.values.parameters())
        taps = [m.__dict__[TAP] for m in self.model.modules() if TAP in m.__dict__]
        moments = [s[key] for s in self.optimizer.state.values() for key in s if key != "step"]
        positions = self.model.selection.indices.values()
        plans = [tensor for tap in taps for tensor in (tap.used, tap.positions)]
        return n_bytes(values) * 2 + n_bytes(positions) + n_bytes(plans) + n_bytes(moments)


class Masked:
    """Dense gradients times 0/1 masks, then a dense fused AdamW (foreach is 6 % slower a step)."""

    def __init__(self, model: nn.Module, selection: piece_ops.Selection, everything: bool) -> None:
        self.model, self.weights, self.masks = model, [], []
        for name, weight in model.named_parameters():
            positions = selection.indices.get(name)
            weight.requires_grad_(everything or positions is not None)
            if weight.requires_grad:
                mask = torch.zeros_like(weight, requires_grad=False)
                if positions is not None:
                    mask.view(-1)[positions] = 1.0
                self.weights.append(weight)
                self.masks.append(mask)
        self.optimizer = torch.optim.AdamW(self.weights, fused=True, **RATES)

    def beyond_activations(self) -> int:
        """Bytes of a gradient, a mask and two moments of each weight."""
        return 4 * n_bytes(self.weights)

    def step(self, data: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**data).loss
        loss.backward()
        torch._foreach_mul_([weight.grad for weight in self.weights], self.masks)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Frozen:
    """No weight trains; the embeddings' output asks for a gradient as a training step's would."""

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_()
        )

    def step(self, data: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**data).loss
        loss.backward()
        return loss.detach()


def dropping_peak(model: nn.Module, selection: piece_ops.Selection, data: dict[str, Tensor]) -> int:
    """Peak bytes of forward and backward when no dense gradient outlives its making."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    hooks = []
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in selection.indices)
        if name in selection.indices:
            hooks.append(weight.register_post_accumulate_grad_hook(drop))
    with Allocations(*model.parameters()) as seen:
        model(**data).loss.backward()
    for hook in hooks:
        hook.remove()
    return seen.peak


def beyond_activations(run: Sampled, data: dict[str, Tensor], dropping: int) -> int:
    """Bytes of a step beyond weights and activations: held, or at the peak, what is more."""
    run.step(data)
    with Allocations(*run.model.parameters()) as seen:
        run.step(data)
    return max(0, seen.peak - dropping) + run.held_bytes()


def step_case(quick: bool, dtype: torch.dtype, method: str, embeddings: bool) -> Case:
    base = load(quick, dtype)
    weights = [p.detach() for p in base.parameters()]
    ids = tokens(quick)
    data = {"input_ids": ids, "labels": ids}
    samples = [{key: value[i : i + 1] for key, value in data.items()} for i in range(len(ids))]
    selection = piece_ops.estimate(base, samples, method, density=1e-3, embeddings=embeddings)
    names = {name for name, _ in base.named_parameters()} - set(selection.indices)
    with torch.no_grad():
        want = float(base(**data).loss)
    dropping = dropping_peak(copy.deepcopy(base), selection, data)
    ours = Sampled(copy.deepcopy(base), selection)
    masked = Masked(copy.deepcopy(base), selection, everything=True)
    partly = Masked(copy.deepcopy(base), selection, everything=False)
    frozen = Frozen(copy.deepcopy(base))
    start = dict(base.named_parameters())

    def right(run: Any) -> Callable[[Tensor], str | None]:
        def check(loss: Tensor) -> str | None:
            if not abs(float(loss) - want) <= 1e-3 * want:
                return f"the loss is {float(loss)}, not {want}"
            model = getattr(run.model, "model", run.model) if run is ours else run.model
            for name, weight in model.named_parameters():
                moved = (weight.detach() != start[name].detach()).view(-1)
                if name not in names and run is not frozen:
                    moved[selection.indices[name]] = False
                if moved.any():
                    return f"unselected weights of {name} moved"
            return None

        return check

    total = n_bytes(weights)
    peers = [
        Peer(FROZEN, lambda: frozen.step(data), right(frozen), "bound"),
        Peer(OURS, lambda: ours.step(data), right(ours), "ours"),
    ]
    for peer, run in ((MASKED, masked), (PARTLY, partly)):
        note = f"beyond activations {100 * run.beyond_activations() / total:.0f} % of the weights"
        peers.append(Peer(peer, partial(run.step, data), right(run), note=note))

    def share(by_name: dict[str, Row]) -> float:
        return 100 * beyond_activations(ours, data, dropping) / total

    targets = [
        Target("time of a step / with masks", time_ratio(OURS, MASKED), 0.72, at_most=True),
        Target("time of a step / with masks, partly frozen", time_ratio(OURS, PARTLY), 0.72, True),
        Target("memory beyond weights and activations", share, 2, at_most=True, unit="%"),
    ]
    return Case(
        "training_step", str(dtype).removeprefix("torch."), total, 2 * total, peers, targets
    )


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    for dtype, method, embeddings in (
        (torch.float32, "random", False),
        (torch.bfloat16, "random", False),
        (torch.float32, "piece-s", False),
        (torch.float32, "random", True),
    ):
        name = f"4 x 128 tokens, 0.1 % by {method}, {str(dtype).removeprefix('torch.')}"
        name += ", embeddings too" if embeddings else ""
        yield name, partial(step_case, quick, dtype, method, embeddings)
