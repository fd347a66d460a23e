"""Deltas in folders and on the Hugging Face hub, by huggingface_hub's ordinary calls."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piece_ops._files import write_text

if TYPE_CHECKING:
    from piece_ops.delta.record import Delta

NAME = "piece_delta.safetensors"


def save_pretrained(delta: Delta, folder: str | os.PathLike[str]) -> Path:
    """See `Delta.save_pretrained`."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    delta.save(path / NAME)
    if not (path / "README.md").exists():
        write_text(path / "README.md", _card(delta))
    return path / NAME


def _card(delta: Delta) -> str:
    """The hub's page: what the base model is, and how to use the file."""
    # A folder of this machine is no base model that the hub could link to.
    is_id = delta.base.count("/") == 1 and not Path(delta.base).exists()
    base = [f"base_model: {json.dumps(delta.base)}"] if is_id else []
    head = "\n".join(["---", *base, "library_name: piece_ops", "tags:", "- sparse-delta", "---"])
    return (
        f"{head}\n\nA sparse delta: {delta.k:,} of {delta.total:,} weights of the base model, with "
        f"their new and their old values.\n\n```python\nfrom piece_ops import Delta\n\n"
        "Delta.from_pretrained(<this repository>).apply_(model)\n```\n"
    )


def push_to_hub(
    delta: Delta,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    message: str,
) -> str:
    """See `Delta.push_to_hub`."""
    api = _huggingface_hub("push_to_hub").HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(delta, folder)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
        )
    return str(done)


def path_of(
    source: str | os.PathLike[str], *, revision: str | None, token: str | bool | None
) -> Path:
    """The delta file in a folder, or downloaded from the hub."""
    path = Path(source)
    if path.is_dir():
        return path / NAME
    if path.is_file():
        return path
    if not isinstance(source, str) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(
            f"piece_ops.Delta.from_pretrained: wanted a folder, a file or a hub id, got "
            f"{os.fspath(source)!r}, which is no folder of this machine"
        )
    hub = _huggingface_hub("from_pretrained")
    return Path(hub.hf_hub_download(source, NAME, revision=revision, token=token))


def _huggingface_hub(function: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"piece_ops.Delta.{function} needs the Python package huggingface_hub to reach the "
            "hub, which is not installed: pip install huggingface_hub",
            name="huggingface_hub",
        ) from error
    return huggingface_hub
