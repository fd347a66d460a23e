"""Per-sample importance on more transformers families: exact sums, and what goes by the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from piece_ops.importance import Importance

from helpers.model_zoo import images, words
from helpers.per_sample import assert_true_sums, rows_of, true_gradients
from helpers.tiny_models import VOCABULARY
from helpers.tolerances import PER_SAMPLE_GRADIENT

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 24, "pad_token_id": 0}
IMAGE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "num_labels": 5,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8}
CAUSAL, SEQ, PICTURE = "CausalLM", "Seq2SeqLM", "ImageClassification"
# config class, task, its settings, how many parameters go by the loop
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen2Config": (CAUSAL, {**TEXT, "num_key_value_heads": 2}, 0),
    "Qwen3MoeConfig": (
        CAUSAL,
        {**TEXT, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
        0,
    ),
    "GptOssConfig": (CAUSAL, {**TEXT, **EXPERTS, "num_local_experts": 4}, 0),
    "GemmaConfig": (CAUSAL, {**TEXT, "num_key_value_heads": 2, "head_dim": 8}, 1),
    "GPTNeoXConfig": (CAUSAL, TEXT, 0),
    "BloomConfig": (
        CAUSAL,
        {"vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 2, "n_head": 4},
        0,
    ),
    "AlbertConfig": ("MaskedLM", {**TEXT, "embedding_size": 12}, 0),
    "MambaConfig": (CAUSAL, {"vocab_size": VOCABULARY, "hidden_size": 24, "state_size": 4}, 8),
    "T5Config": (
        SEQ,
        {**SEQ2SEQ, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4},
        2,
    ),
    "BeitConfig": (PICTURE, {**IMAGE, "use_relative_position_bias": True}, 0),
    "Dinov2Config": (PICTURE, IMAGE, 0),
    "ConvNextConfig": (
        PICTURE,
        {"hidden_sizes": [8] * 4, "depths": [1] * 4, "patch_size": 1, "num_labels": 5},
        0,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_every_samples_own_gradient(name: str, reproducible: None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    task, settings, looped = FAMILIES[name]
    config = getattr(transformers, name)(**settings)
    if name in ("MambaConfig", "T5Config"):
        config.num_hidden_layers = config.num_layers = 2
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    given = images(seed=1) if task == PICTURE else words(seed=1)
    importance = Importance(model, "piece-s", embeddings=True)
    importance.update(given)
    assert len(importance.looped) == looped, importance.looped
    assert_true_sums(importance, true_gradients(model, rows_of(given)), PER_SAMPLE_GRADIENT)
