"""Small random transformers models of every family that matters, each with a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from helpers.tiny_models import VOCABULARY, batch, gpt2, llama

Batch = dict[str, Tensor]
IMAGE_TOKEN = 3


def bert() -> Any:
    """Encoder: position table, layer norms, biases, a tied head, labels at masked tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return BertForMaskedLM(config).eval()


def masked_words(rows: int = 4, seed: int = 0) -> Batch:
    """Different numbers of masked words, right padding."""
    data = batch(rows, 7, seed=seed, pad=3)
    chosen = torch.rand(data["labels"].shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    chosen[:, :2] = True
    labels = data["input_ids"].masked_fill(~chosen | (data["attention_mask"] == 0), -100)
    return {**data, "labels": labels}


def vit() -> Any:
    """Patches by a convolution; class token and positions are the embeddings' own parameters."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


def images(rows: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % 5}


def mixtral() -> Any:
    """Experts in 3-D parameters, a router with three results."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


def llava() -> Any:
    """A vision tower, a projector and a language model."""
    torch.manual_seed(0)
    text = llama().config
    vision = CLIPVisionConfig(
        image_size=8,
        patch_size=4,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=24,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, pad_token_id=0
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # CLIP's own initialisation is so small that gradients vanish
        for parameter in model.model.vision_tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def pictures_and_words(rows: int = 3, seed: int = 0) -> Batch:
    """Each row begins with an image of four patches."""
    words = batch(rows, 6, seed=seed, pad=3)
    words["input_ids"].masked_fill_(words["input_ids"] == IMAGE_TOKEN, IMAGE_TOKEN + 1)
    front = torch.full((rows, 4), IMAGE_TOKEN)
    return {
        "input_ids": torch.cat([front, words["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), words["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(front, -100), words["labels"]], 1),
        "pixel_values": images(rows, seed)["pixel_values"],
    }


def words(rows: int = 4, seed: int = 0) -> Batch:
    """Right padding, different numbers of answer tokens."""
    return batch(rows, 7, seed=seed, pad=3)


ZOO: dict[str, tuple[Callable[[], Any], Callable[..., Batch]]] = {
    "llama": (llama, words),
    "llama tied": (lambda: llama(tied=True), words),
    "gpt2": (gpt2, words),
    "bert": (bert, masked_words),
    "vit": (vit, images),
    "mixtral": (mixtral, words),
    "llava": (llava, pictures_and_words),
}


def packed(parts: list[Batch]) -> Batch:
    """Rows of a batch without padding, one after another in one row."""
    ids = [part["input_ids"] for part in parts]
    positions = [torch.arange(one.shape[1])[None] for one in ids]
    return {
        "input_ids": torch.cat(ids, 1),
        "position_ids": torch.cat(positions, 1),
        "labels": torch.cat([part["labels"] for part in parts], 1),
    }
