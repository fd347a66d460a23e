"""Text that a model samples from itself: what it knows, without any of the data it learned from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROWS_AT_ONCE = 32  # texts generated together; bounds the key-value cache
ROWS_OF_A_BATCH = 8  # texts handed out together; bounds the logits of a pass


def self_texts(
    model: nn.Module, *, samples: int, tokens: int, seed: int, where: str
) -> Iterator[dict[str, Tensor]]:
    """Sampled texts as right-padded batches, each text labelled with every token it sampled.

    The first token is the model's BOS; then up to `tokens` tokens at temperature 1 from the full
    distribution (no top-k, no top-p), until end of text. Sampling runs in evaluation mode; the
    modules' modes and the global random state are restored.
    """
    generate: Any = getattr(model, "generate", None)
    if not callable(generate):
        raise ValueError(
            f"{where}: reference='self' needs a model with generate(), got {type(model).__name__}; "
            "pass reference batches instead"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{where}: reference='self' needs a decoder-only model, got an encoder-decoder; pass "
            "reference batches instead"
        )
    for name, value in (("reference_samples", samples), ("reference_tokens", tokens)):
        if value < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {value}")
    begin = _token(model, "bos_token_id")
    if begin is None:
        raise ValueError(
            f"{where}: reference='self' starts texts with the model's bos_token_id, got none in "
            "its config; set model.config.bos_token_id or pass reference batches instead"
        )
    end = _token(model, "eos_token_id")
    pad = next(t for t in (_token(model, "pad_token_id"), end, begin) if t is not None)
    device = next(model.parameters()).device
    for start in range(0, samples, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, samples - start)
        # Every chunk has its own seed, so the texts do not depend on what ran in between.
        texts = _generate(model, generate, rows, tokens, begin, pad, seed + start, device)
        ends = _tokens(model, "eos_token_id")
        for first in range(0, rows, ROWS_OF_A_BATCH):
            some = texts[first : first + ROWS_OF_A_BATCH]
            lengths = torch.tensor([_length(text, ends) for text in some], device=device)
            is_text = torch.arange(some.shape[1], device=device) < lengths[:, None]
            yield {
                "input_ids": some,
                "attention_mask": is_text.long(),
                "labels": some.masked_fill(~is_text, -100),
            }


def _generate(
    model: nn.Module,
    generate: Any,
    rows: int,
    tokens: int,
    begin: int,
    pad: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    prompt = torch.full((rows, 1), begin, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            # Everything that could bend the distribution is set: a model's own generation config
            # fills in what is left open.
            texts: Tensor = generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                num_beams=1,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=tokens,
                pad_token_id=pad,
                return_dict_in_generate=False,
            )
            return texts
    finally:
        for module, training in modes:
            module.training = training


def _length(text: Tensor, ends: list[int]) -> int:
    """Tokens up to and including the first end of text after BOS (which may be the same token)."""
    for place, token in enumerate(text.tolist()):
        if place and token in ends:
            return place + 1
    return text.numel()


def _tokens(model: nn.Module, name: str) -> list[int]:
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(config, name, None)
        if value is not None:
            return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return []


def _token(model: nn.Module, name: str) -> int | None:
    return next(iter(_tokens(model, name)), None)
