"""Loading and saving models and tokenizers of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from piece_ops import _native
from piece_ops.training.extra import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")


class ModelError(ValueError):
    """A model or tokenizer cannot be loaded; the text says which and why."""


def _looks_like_path(source: str) -> bool:
    """Tell a folder on this machine from a hub id ``owner/name``."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()


def _check_folder(source: str) -> str:
    """Check that a local folder holds a model and return the name to load."""
    if not _looks_like_path(source):
        return source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ModelError(f"model {source}: wanted a folder or a hub id, got no such folder")
    if not (folder / "config.json").is_file():
        if (folder / "model" / "config.json").is_file():
            raise ModelError(
                f"model {source}: the folder must hold config.json, got the folder of a run, whose "
                f"model is {folder / 'model'}"
            )
        raise ModelError(f"model {source}: the folder must hold config.json, got none")
    return str(folder)


def _reason(error: BaseException) -> str:
    """Return the first line of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def resolve_device(name: str) -> str:
    """Say where to work: ``"cpu"`` or ``"cuda"``.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda"}
        ``"auto"`` is ``"cuda"`` where torch sees a GPU and this build holds CUDA kernels, and
        ``"cpu"`` elsewhere.

    Raises
    ------
    ModelError
        If ``"cuda"`` is asked for and one of the two is missing; the text says which.
    """
    if name == "cpu":
        return name
    found = _native.describe()
    if found["gpu"] and found["cuda_architectures"]:
        return "cuda"
    if name == "cuda":
        lacks = "this build has no CUDA kernels" if found["gpu"] else "torch sees no GPU"
        raise ModelError(f"device: wanted cuda, but {lacks} (`piece-ops info` says more)")
    return "cpu"


def load_model(source: str, *, dtype: str = "float32", device: str = "cpu") -> Any:
    """Load a causal language model.

    Parameters
    ----------
    source : str
        A folder written by ``save_pretrained``, or a hub id.
    dtype : {"float32", "bfloat16"}
        Data type of the weights.
    device : str
        Where to put it, for instance ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    ModelError
        If it cannot be loaded, or a weight is missing in the folder (transformers would fill it
        with random numbers).
    ModuleNotFoundError
        If transformers is not installed.

    Examples
    --------
    >>> model = load_model("./smollm2-135m-instruct", dtype="bfloat16")  # doctest: +SKIP
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    transformers = require("transformers", "loading a model")
    name = _check_folder(source)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], output_loading_info=True
        )
    # transformers, safetensors and the hub client raise many unrelated types here (OSError,
    # ValueError, KeyError, SafetensorError, HTTP errors); the cause is chained and its first line
    # shown.
    except Exception as error:
        raise ModelError(f"model {source}: cannot be loaded: {_reason(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {source}: {len(missing)} weights are missing in its files (first: {missing[0]})"
        )
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"model {source}: cannot be moved to device {device!r}: {_reason(error)}"
        ) from error
    model.eval()
    return model


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer that belongs to a model.

    Parameters
    ----------
    source : str
        The same folder or hub id as for `load_model`.

    Returns
    -------
    transformers.PreTrainedTokenizerBase

    Raises
    ------
    ModelError
        If it cannot be loaded or has no end-of-sequence token.
    """
    transformers = require("transformers", "loading a tokenizer")
    name = _check_folder(source)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # see load_model
        raise ModelError(
            f"model {source}: its tokenizer cannot be loaded: {_reason(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {source}: its tokenizer must have an end-of-sequence token, got none"
        )
    return tokenizer


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer as a normal Hugging Face folder.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    folder : Path
        Made if it is not there. The caller makes it appear under its final name (see `run`).
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
