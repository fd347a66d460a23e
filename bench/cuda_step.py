"""A training step and an importance pass of a large model on a GPU: plans and their peers.

Half of Llama-8B's layers, so that masking's gradients, masks and moments fit beside the weights;
every layer costs the same, the output head and the loss weigh twice as much as in the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import piece_ops
from bench.bench_training_step import FROZEN, MASKED, OURS, Frozen, Masked, Sampled
from bench.cuda_timing import Peer, Plan, Target
from bench.harness import Absent, time_ratio

SAMPLES, TOKENS, LAYERS = 8, 1024, 16
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
PARAMETERS = 4_540_600_320
ORDINARY = "ordinary forward and backward"
PER_SAMPLE = "piece_ops"
FLOP_PER_MS = 600e9  # bfloat16 products, attention and the rest included


def half_llama(layers: int = LAYERS, **shape: int) -> Any:
    """Weights at random: only time and memory are measured."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Absent(f"needs transformers: {error}") from None
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=8192, **shape)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def batch_for(model: Any, samples: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, model.config.vocab_size, (samples, tokens), device="cuda")
    return {"input_ids": ids, "labels": ids}


def step(samples: int, tokens: int, layers: int, shape: dict[str, int]) -> list[Peer]:
    model = half_llama(layers, **shape)
    data = batch_for(model, samples, tokens)
    selection = piece_ops.estimate(model, [data], "random", density=1e-3)
    masked = Masked(copy.deepcopy(model), selection, everything=True)
    frozen = Frozen(copy.deepcopy(model))
    name, index = next(iter(selection.indices.items()))
    before = dict(model.named_parameters())[name].detach().clone()
    ours = Sampled(model, selection)

    def check(_: Any) -> str | None:
        moved = (dict(ours.model.model.named_parameters())[name] != before).view(-1)
        moved[index] = False
        return f"unselected weights of {name} moved" if bool(moved.any()) else None

    return [
        Peer(FROZEN, lambda: frozen.step(data), role="bound"),
        Peer(OURS, lambda: ours.step(data), check, role="ours"),
        Peer(MASKED, lambda: masked.step(data)),
    ]


def importance(samples: int, tokens: int, layers: int, shape: dict[str, int]) -> list[Peer]:
    model = half_llama(layers, **shape)
    data = batch_for(model, samples, tokens)
    statistics = piece_ops.Importance(model, "piece-f")

    def ordinary() -> None:
        model.requires_grad_(True)
        model(**data).loss.backward()
        model.zero_grad(set_to_none=True)

    def ours() -> None:
        statistics.update(data)

    def check(_: Any) -> str | None:
        looped = statistics.looped
        return f"{len(looped)} parameters went by the loop: {looped}" if looped else None

    return [Peer(ORDINARY, ordinary), Peer(PER_SAMPLE, ours, check, role="ours")]


def plans() -> Iterator[Plan]:
    words = 2 * PARAMETERS
    flop = PARAMETERS * SAMPLES * TOKENS
    size = (SAMPLES, TOKENS, LAYERS, SHAPE)
    name = f"half of Llama-8B's layers, {SAMPLES} x {TOKENS} tokens"
    yield Plan(
        "training_step",
        f"{name}, 0.1 % at random",
        PARAMETERS,
        words,
        [Target("time of a step / with masks", time_ratio(OURS, MASKED), 0.72, at_most=True)],
        partial(step, *size),
        more_ms=4 * flop / FLOP_PER_MS,
    )
    yield Plan(
        "importance",
        f"{name}, every sample's squares",
        PARAMETERS,
        words,
        [Target("time / forward and backward", time_ratio(PER_SAMPLE, ORDINARY), 1.15, True)],
        partial(importance, *size),
        our_bytes=words + 8 * PARAMETERS,
        more_ms=6 * flop / FLOP_PER_MS,
    )
