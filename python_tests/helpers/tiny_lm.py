"""A language model of a few thousand random weights and a byte tokenizer, made in a moment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from piece_ops.training import Settings

COLOURS = [(f"{name}?", kind) for name in "abcdefghij" for kind in ("red", "blue")]
"""Rows of a task that can only be learned by heart."""

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(chat: bool = False) -> Any:
    """One token a byte, and <s>, </s>, <|end|>; with a chat template if asked."""
    specials = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
    )
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def tiny_model(seed: int = 0, dropout: float = 0.0) -> Any:
    """A Llama of two layers, about 30,000 weights, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, chat: bool = False, seed: int = 0, dropout: float = 0.0) -> Path:
    """Write model and tokenizer as a Hugging Face folder."""
    tiny_model(seed, dropout).save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """Write (prompt, answer) pairs as JSONL."""
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def quick(**more: Any) -> Settings:
    """Settings of a run that takes a second."""
    base: dict[str, Any] = {
        "method": "piece-f",
        "density": 0.01,
        "lr": 1e-2,
        "steps": 3,
        "batch_size": 4,
        "importance_rows": 4,
        "reference_rows": 2,
        "reference_tokens": 6,
        "window": 16,
    }
    return Settings(**{**base, **more})
