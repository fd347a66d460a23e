"""Small real transformers models with random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Two layers, 9 to 11 thousand parameters, grouped-query attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(*, seed: int = 0) -> Any:
    """Two layers; transposed linear layers, biases, learned positions, a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "llama bf16": lambda: llama(dtype=torch.bfloat16),
    "gpt2": gpt2,
}


def batch(
    rows: int = 3, length: int = 7, *, seed: int = 0, pad: int = 0
) -> dict[str, torch.Tensor]:
    """Random tokens, the first two of each row not labelled, `pad` columns of right padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length + pad), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :2] = -100
    if pad:
        for row in range(rows):
            cut = length + row % (pad + 1)
            ids[row, cut:], mask[row, cut:], labels[row, cut:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def random_positions(model: nn.Module, density: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Some positions of every parameter, at least one each."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, parameter in model.named_parameters():
        count = max(1, int(density * parameter.numel()))
        order = torch.randperm(parameter.numel(), generator=generator)
        chosen[name] = order[:count].sort().values
    return chosen
