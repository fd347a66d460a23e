"""The parameter tensors of a model, from its configuration alone: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHERE = "piece_ops.predict.read_model"


@dataclass(frozen=True)
class Weight:
    """`count` tensors of one shape.

    `kind`: linear (gradients of k entries can be sampled), embedding, tied (an embedding that is
    also the output head), or other (norms, convolutions, fused experts: a dense gradient).
    `active`: the share of it that one token is multiplied with.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    active: float = 1.0
    count: int = 1

    @property
    def n(self) -> int:
        """Elements of all of them."""
        found = self.count
        for side in self.shape:
            found *= side
        return found

    @property
    def is_multiplied(self) -> bool:
        """Whether tokens are multiplied with it; norms and plain embeddings cost little."""
        return self.kind in ("linear", "tied") or (self.kind == "other" and len(self.shape) > 1)


@dataclass(frozen=True)
class Model:
    """A named list of weights; `source` says where it comes from."""

    name: str
    weights: tuple[Weight, ...]
    source: str

    @property
    def n(self) -> int:
        """All parameters."""
        return sum(weight.n for weight in self.weights)

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with."""
        return sum(w.n * w.active for w in self.weights if w.is_multiplied)

    @property
    def tensors(self) -> int:
        """Parameter tensors."""
        return sum(weight.count for weight in self.weights)


def _config(layers: int, width: int, hidden: int, heads: int, vocabulary: int, **more: Any) -> Any:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        **more,
    }


# As in the config.json of meta-llama/Meta-Llama-3-8B, -70B, Llama-3.1-405B, mistralai/Mixtral-8x7B.
CONFIGS: dict[str, Any] = {
    "llama-3-8b": _config(32, 4096, 14336, 32, 128256),
    "llama-3-70b": _config(80, 8192, 28672, 64, 128256),
    "llama-3.1-405b": _config(126, 16384, 53248, 128, 128256),
    "mixtral-8x7b": _config(32, 4096, 14336, 32, 32000, num_local_experts=8, num_experts_per_tok=2),
}


def read_model(name: str) -> Model:
    """Return the parameter shapes of a named configuration or of a ``config.json``.

    Parameters
    ----------
    name : str
        One of ``CONFIGS``, a ``config.json``, or a folder that holds one. A file is built by
        transformers on the meta device if it is installed; else, or if that fails, computed as that
        of a Llama-like model (Mixtral-like, if it names experts).

    Returns
    -------
    Model

    Raises
    ------
    ValueError
        If there is no such name or file, or the configuration is not enough.

    Examples
    --------
    >>> read_model("llama-3-8b").n
    8030261248
    """
    if name in CONFIGS:
        return Model(name, llama_like(CONFIGS[name]), "published shapes")
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{WHERE}: CONFIG must be one of {', '.join(CONFIGS)}, or a config.json, got {name!r}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{WHERE}: {path} must be JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{WHERE}: {path} must hold an object, got {type(config).__name__}")
    label = str(config.get("_name_or_path") or path.resolve().parent.name)
    try:
        from piece_ops.training.shapes import meta_weights

        found = meta_weights(path)
    except Exception as error:  # whatever transformers raises for a configuration it cannot build
        why = (str(error).splitlines() or [type(error).__name__])[0]
        source = f"formulas of a Llama-like model (transformers: {why[:100]})"
        return Model(label, llama_like(config), source)
    weights = tuple(
        Weight(n, shape, kind, _active(n, shape, kind, config)) for n, shape, kind in found
    )
    return Model(label, weights, "built by transformers on the meta device")


def llama_like(config: Mapping[str, Any]) -> tuple[Weight, ...]:
    """Weights of a Llama, Mistral, Qwen2 (without biases) or Mixtral, experts fused as in
    transformers 5."""
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    missing = [key for key in (*needed, "vocab_size") if not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"{WHERE}: the configuration must have {', '.join(missing)}, got none")
    layers, width, hidden, heads = (int(config[key]) for key in needed)
    head = int(config.get("head_dim") or width // heads)
    queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    is_tied = bool(config.get("tie_word_embeddings", False))
    vocabulary = (int(config["vocab_size"]), width)
    experts = _experts(config)
    weights = [
        Weight("embed_tokens", vocabulary, "tied" if is_tied else "embedding"),
        Weight("q_proj", (queries, width), "linear", count=layers),
        Weight("k_proj, v_proj", (keys, width), "linear", count=2 * layers),
        Weight("o_proj", (width, queries), "linear", count=layers),
        Weight("norm", (width,), "other", count=2 * layers + 1),
    ]
    if experts:
        share = int(config.get("num_experts_per_tok") or 1) / experts
        hidden = int(config.get("moe_intermediate_size") or hidden)
        fused = {
            "gate_up_proj": (experts, 2 * hidden, width),
            "down_proj": (experts, width, hidden),
        }
        weights += [Weight(n, shape, "other", share, layers) for n, shape in fused.items()]
        # The router is no nn.Linear.
        weights.append(Weight("gate", (experts, width), "other", count=layers))
    else:
        weights.append(Weight("gate_proj, up_proj", (hidden, width), "linear", count=2 * layers))
        weights.append(Weight("down_proj", (width, hidden), "linear", count=layers))
    if not is_tied:
        weights.append(Weight("lm_head", vocabulary, "linear"))
    return tuple(weights)


def _experts(config: Mapping[str, Any]) -> int:
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(config[key]) for key in keys if config.get(key)), 0)


def _active(name: str, shape: tuple[int, ...], kind: str, config: Mapping[str, Any]) -> float:
    experts = _experts(config)
    is_expert = ".experts." in name and "shared" not in name
    return int(config.get("num_experts_per_tok") or 1) / experts if experts and is_expert else 1.0
