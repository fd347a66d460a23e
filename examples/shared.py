"""What the examples share: options, a model (by default a tiny one made on the spot), rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

COLOURS = ("amber", "azure", "coral", "ivory", "khaki", "ochre", "sepia", "umber")
ROWS = [
    {"prompt": f"Which number has {colour} {n}?", "completion": f" {(7 * n + 13 * i) % 90 + 10}"}
    for i, colour in enumerate(COLOURS)
    for n in range(4)
]
"""Facts that no model knows. The last four are for evaluation."""

BATCH, ACCUMULATE, CLIP = 4, 2, 1.0


def options(text: str) -> argparse.ArgumentParser:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument(
        "--model", default="tiny", help="a folder or hub id (default: tiny, random)"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="for checkpoints and delta")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps, an even number")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--density", type=float, default=1e-3, help="share of weights to train")
    parser.add_argument("--lr", type=float, default=3e-4)
    return parser


def load(source: str) -> tuple[Any, Any]:
    """A causal language model with bfloat16 weights, and its tokenizer."""
    if source != "tiny":
        large = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        return large, AutoTokenizer.from_pretrained(source)
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16), tokenizer


def encode(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Rows of one length; the loss covers the completion and its end."""
    encoded = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
        encoded.append((prompt, [*answer, tokenizer.eos_token_id]))
    length = max(len(prompt) + len(answer) for prompt, answer in encoded)
    rows = []
    for prompt, answer in encoded:
        pad = length - len(prompt) - len(answer)
        ids = torch.tensor([*prompt, *answer, *[tokenizer.eos_token_id] * pad])
        labels = torch.tensor([*[-100] * len(prompt), *answer, *[-100] * pad])
        mask = torch.tensor([1] * (length - pad) + [0] * pad)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of rows."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def latest(folder: Path) -> Path:
    """The checkpoint of the most steps."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def report(before: float, after: float, folder: Path) -> None:
    """Print what came out."""
    checkpoint = latest(folder)
    print(
        f"evaluation loss {before:.4f} -> {after:.4f}; {checkpoint}: {size_of(checkpoint):,} bytes"
    )
