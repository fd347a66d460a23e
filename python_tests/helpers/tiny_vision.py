"""Vision-language models of transformers with random weights, and samples: an image and a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCABULARY, IMAGE = 64, 60
IMAGE_TOKENS = 4  # what each model makes of an image of 8 x 8 pixels


def llava() -> Any:
    """A CLIP tower, a projector, a Llama."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def _qwen_text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],  # half of a head's 8 channels
        },
        **more,
    }


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        **more,
    }


TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}


def qwen25() -> Any:
    """Qwen2.5-VL: windowed attention over patches of any number."""
    torch.manual_seed(0)
    vision = _qwen_vision(window_size=8, fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3() -> Any:
    """Qwen3-VL: features of early vision layers enter the language model, too."""
    torch.manual_seed(0)
    vision = _qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0])
    text = _qwen_text(head_dim=8)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return Qwen3VLForConditionalGeneration(config).eval()


VISION_MODELS = {"llava": llava, "qwen2.5-vl": qwen25, "qwen3-vl": qwen3}
TOWER = {"llava": "vision_tower", "qwen2.5-vl": "visual", "qwen3-vl": "visual"}


def sample(model: Any, seed: int, *, pad: int = 0) -> dict[str, Tensor]:
    """One image and five words about it, of which three are labels; `pad` columns of padding.

    The image is a coloured square on noise; no processor is needed.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 8, 8, generator=generator)
    image[seed % 3, 2:6, 2:6] = 1.0
    words = torch.randint(3, IMAGE, (5,), generator=generator)
    is_qwen = "Qwen" in type(model).__name__
    start, end = ([62], [63]) if is_qwen else ([], [])
    ids = torch.tensor([1, *start, *[IMAGE] * IMAGE_TOKENS, *end, *words.tolist(), *[0] * pad])
    labels = torch.full_like(ids, -100)
    stop = len(ids) - pad
    labels[stop - 3 : stop] = ids[stop - 3 : stop]
    mask = torch.ones_like(ids)
    mask[stop:] = 0
    batch = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
    if not is_qwen:
        return {**batch, "pixel_values": image[None]}
    # Patches of 2 x 2 pixels and two equal frames, the four that are merged beside one another.
    patches = image.expand(2, 3, 8, 8).reshape(2, 3, 2, 2, 2, 2, 2, 2)
    patches = patches.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(16, 24)
    return {
        **batch,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int()[None],
    }
