"""A training step of SmolLM2-135M with 0.1 % of its weights, against dense gradients and masks.

4 x 128 tokens: forward, backward, update. With N = 134.5 M weights in matrices, forward takes 2 N
operations a token and gradients of the inputs 2 N, which every way pays. Masking, as it is usually
done, adds 2 N for weight gradients, moves 12 bytes a weight for the masks and 28 for AdamW. So
sampling can be expected below 4 N / 6 N = 0.67 of the products' time; attention and the loss, the
same for all, dilute it. Where the embedding (28.3 M, also the output head) has no selected weight,
masking may freeze it and pays 2 (N - 28.3 M): 0.72 of the products' time at best.

Memory beyond weights and activations: what is held from step to step, and the largest of what
forward, backward and update each make on top. Forward and backward are watched by the dispatcher
beside those of the same model frozen: a storage that has no counterpart there, made by the same
operation in the same size, counts, also where the logits are far larger, until it is freed. (By
size alone, the products in norms' weight gradients, which come and go, would leave as many ordinary
gradients of activations without counterparts.) Copies of columns of an input, which
backward needs in place of the input, count as activations.

The coordinates are chosen by the float32 model, once for both dtypes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import piece_ops
from bench.allocations import Allocations
from bench.harness import Absent, Case, Peer, Row, Target, time_ratio
from bench.smollm2 import absent_case, case_name, load, token_ids
from piece_ops._taps import TAP

OURS = "piece_ops"
MASKED = "torch: mask gradients, AdamW(fused)"
PARTLY = "the same, unselected tensors frozen"
FROZEN = "forward, gradients of inputs only"
RATES = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
SECONDS = 3.0  # of the timed calls of one peer
COLD = 10.0  # of a first step, which may take three times as long as the others


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
        """Values, positions, base values, what the taps know, moments; no gradients."""
        values = list(self.model.values.parameters())
        targets = [v.piece_target for v in values]  # type: ignore[attr-defined]
        taps = [m.__dict__[TAP] for m in self.model.modules() if TAP in m.__dict__]
        moments = [s[key] for s in self.optimizer.state.values() for key in s if key != "step"]
        kept = [tensor for t in targets for tensor in (t.indices, t.base_values)]
        plans = [tensor for tap in taps for tensor in (tap.used, tap.positions)]
        return n_bytes([*values, *kept, *plans, *moments])


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


def beyond_activations(run: Sampled, frozen: Frozen, data: dict[str, Tensor]) -> int:
    """Bytes of a step beyond weights and activations."""
    run.step(data)  # makes the optimizer's state
    held = run.held_bytes()
    losses: dict[int, Tensor] = {}

    def forward(model: Any) -> None:
        losses[id(model)] = model(**data).loss

    def backward(model: Any) -> None:
        losses.pop(id(model)).backward()

    most = 0
    for phase in (forward, backward):
        with Allocations(*frozen.model.parameters()) as plain:
            phase(frozen.model)
        most = max(most, unmatched_peak(plain, partial(phase, run.model), run.model))
    gradients = n_bytes(values.grad for values in run.model.values.parameters())
    with Allocations(*run.model.parameters()) as update:
        run.optimizer.step()
    run.optimizer.zero_grad()
    return held + max(most, gradients + update.peak)


def unmatched_peak(plain: Allocations, phase: Callable[[], None], model: nn.Module) -> int:
    """Peak bytes of what a phase makes and the plain one does not, by operation and size."""
    expected = Counter((operation, n_bytes) for operation, _, n_bytes in plain.made)

    def counts(operation: str, size: int) -> bool:
        if operation.startswith("aten.gather"):  # columns of an input, kept for backward
            return False
        expected[operation, size] -= 1
        return expected[operation, size] < 0

    with Allocations(*model.parameters(), counts=counts) as seen:
        phase()
    return seen.peak


@lru_cache(maxsize=1)
def chosen(
    quick: bool, method: str, embeddings: bool, size: tuple[int, int]
) -> piece_ops.Selection:
    ids = token_ids(quick, *size)
    data = {"input_ids": ids, "labels": ids}
    model = load(quick, torch.float32)
    return piece_ops.estimate(model, [data], method, density=1e-3, embeddings=embeddings)


def step_case(
    quick: bool, dtype: torch.dtype, method: str, embeddings: bool, size: tuple[int, int]
) -> Case:
    try:
        base = load(quick, dtype)
    except Absent as error:
        return absent_case("training_step", dtype, OURS, error)
    weights = [p.detach() for p in base.parameters()]
    ids = token_ids(quick, *size)
    data = {"input_ids": ids, "labels": ids}
    selection = chosen(quick, method, embeddings, size)
    names = {name for name, _ in base.named_parameters()} - set(selection.indices)
    with torch.no_grad():
        want = float(base(**data).loss)
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
        return 100 * beyond_activations(ours, frozen, data) / total

    targets = [
        Target("time of a step / with masks", time_ratio(OURS, MASKED), 0.72, at_most=True),
        Target("time of a step / with masks, partly frozen", time_ratio(OURS, PARTLY), 0.72, True),
        Target("memory beyond weights and activations", share, 2, at_most=True, unit="%"),
    ]
    name = str(dtype).removeprefix("torch.")
    limits = {"peer_seconds": SECONDS, "least_rounds": 3, "long": COLD}
    return Case("training_step", name, total, 2 * total, peers, targets, **limits)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    size = (2, 16) if quick else (4, 128)
    for dtype, method, embeddings in (
        (torch.float32, "piece-s", False),
        (torch.bfloat16, "piece-s", False),
        (torch.float32, "random", True),
    ):
        more = [f"0.1 % by {method}", str(dtype).removeprefix("torch.")]
        more += ["embeddings too"] if embeddings else []
        name = case_name(quick, *size, *more)
        yield name, partial(step_case, quick, dtype, method, embeddings, size)
