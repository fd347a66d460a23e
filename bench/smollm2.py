"""SmolLM2-135M and real text, as the demo stores them; for --quick a small random model like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Absent, Case, Peer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "smollm2-135m-instruct"
SMALL_VOCABULARY = 1000


def load(quick: bool, dtype: torch.dtype) -> Any:
    """The model, in training mode; fetched (93 MB) where the cache has none."""
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Absent(str(error)) from None
    if quick:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=SMALL_VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(dtype).train()
    from demo.model import DemoError, prepare_model

    try:
        folder = prepare_model(FOLDER.parent)
    except DemoError as error:
        raise Absent(str(error)) from None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def token_ids(quick: bool, rows: int, length: int) -> Tensor:
    """Rows of real text, so that importance scores lie as they do in use (quick: at random)."""
    if quick:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(SMALL_VOCABULARY, (rows, length), generator=generator)
    from transformers import AutoTokenizer

    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt")["input_ids"]
    return ids[0, : rows * length].view(rows, length)  # type: ignore[no-any-return]


def absent_case(op: str, dtype: torch.dtype, peer: str, error: Exception) -> Case:
    """A case with one row, which says why it could not be built."""

    def run() -> None:
        raise error

    return Case(op, str(dtype).removeprefix("torch."), 0, 0, [Peer(peer, run, role="ours")])


def case_name(quick: bool, rows: int, length: int, *more: str) -> str:
    """What was run, by its true sizes."""
    model = "a small model" if quick else "SmolLM2-135M"
    return ", ".join([f"{model}, {rows} x {length} tokens", *more])
