"""The whole pipeline with PEFT's adapters: SHiRA with as many weights as ours, and LoRA.

Neither looks at data to choose. SHiRA trains r (in + out) weights of a layer, at random positions:
with r = 1 in q_proj, o_proj and down_proj of SmolLM2-135M 132,480, and 134,515 are 0.1 %; no other
choice of kinds of layers comes closer. LoRA: r = 8 in q_proj and v_proj, PEFT's own default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.bench_training_step import RATES, n_bytes
from bench.pipeline_way import Positions, Way

SHIRA, LORA = "peft SHiRA, r = 1", "peft LoRA, r = 8"


class Adapter(Way):
    def set_up(self, chosen: Positions, folder: Path) -> None:
        import peft

        self.model = peft.get_peft_model(self.model, self.config())
        self.optimizer = torch.optim.AdamW(self.reduced(), fused=True, **RATES)

    def config(self) -> Any:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def weights(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight
            for name, weight in self.model.named_parameters()
            if not weight.requires_grad
        }


class Shira(Adapter):
    name = SHIRA

    def config(self) -> Any:
        import peft

        kinds = ["q_proj", "o_proj", "down_proj"]
        return peft.ShiraConfig(r=1, target_modules=kinds, random_seed=0)

    def state_bytes(self) -> int:
        layers = [m for m in self.model.modules() if hasattr(m, "shira_indices")]
        indices = [tensor for layer in layers for tensor in layer.shira_indices.values()]
        return super().state_bytes() + n_bytes(indices)


class Lora(Adapter):
    name = LORA

    def config(self) -> Any:
        import peft

        return peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
