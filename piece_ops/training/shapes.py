"""Parameter shapes of a Hugging Face configuration, without its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from piece_ops.importance.rules import kind_of
from piece_ops.training.extra import require


def meta_weights(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Build a causal language model on the meta device, which holds no memory.

    Parameters
    ----------
    path : Path
        A ``config.json``; code from elsewhere (``auto_map``) is not run.

    Returns
    -------
    list of (name, shape, kind)
        Every parameter once. `kind`: "linear", "embedding", "tied" (an embedding that is also
        the output head) or "other".
    """
    transformers = require("transformers", "a model's shapes")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    kinds: dict[int, set[str]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            kinds.setdefault(id(parameter), set()).add(kind_of(module))
    return [
        (name, tuple(parameter.shape), _kind(kinds[id(parameter)], parameter.ndim))
        for name, parameter in model.named_parameters()
    ]


def _kind(kinds: set[str], rank: int) -> str:
    if "embedding" in kinds:
        return "tied" if len(kinds) > 1 else "embedding"
    return "linear" if kinds <= {"linear", "transposed"} and rank == 2 else "other"
