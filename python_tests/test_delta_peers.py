"""Deltas and other programs: PEFT's SHiRA adapters, the hub, and plain torch + safetensors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from piece_ops import Delta, PieceModel, Selection
from piece_ops.delta import diff, from_shira, to_shira

from helpers import tolerances
from helpers.deltas import same, snapshot, train
from helpers.tiny_models import MODELS, batch, gpt2, llama, random_positions

peft = pytest.importorskip("peft")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FORMAT = (Path(__file__).parents[1] / "docs" / "delta_format.md").read_text(encoding="utf-8")


def linear_names(model: nn.Module) -> list[str]:
    return [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def train_linear(model: nn.Module) -> Delta:
    """As `train`, on the linear layers only."""
    names = linear_names(model)
    chosen = {n: p for n, p in random_positions(model, 0.05).items() if n in names}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    wrapped = PieceModel(
        model, Selection(chosen, shapes, sum(p.numel() for p in model.parameters()))
    )
    with torch.no_grad():
        for values in wrapped.values.parameters():
            values.add_(torch.randn(values.shape))
    delta = wrapped.delta(base="somebody/llama")
    wrapped.unload()
    return delta


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=batch()["input_ids"]).logits
    return found


# ------------------------------------------------------------------------------------------ SHiRA


@DTYPES
def test_an_exported_adapter_gives_our_logits_in_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype=dtype)
    delta = train_linear(model)
    wanted, trained = logits(model), snapshot(model)
    to_shira(delta, model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(llama(dtype=dtype), tmp_path)
    found = logits(adapted)
    merged = dict(adapted.merge_and_unload().named_parameters())
    if dtype == torch.float32:
        bound = tolerances.SHIRA_LOGITS * float(wanted.abs().max())
        assert float((found - wanted).abs().max()) <= bound
        base = snapshot(llama())
        for name, weight in trained.items():
            allowed = tolerances.SHIRA_WEIGHT * (weight.abs() + (weight - base[name]).abs())
            assert bool(((merged[name].detach() - weight).abs() <= allowed).all())
    else:  # rounded to bfloat16 the sum is our value again
        assert torch.equal(found, wanted)
        assert all(torch.equal(merged[name], weight) for name, weight in trained.items())


@DTYPES
def test_an_adapter_that_peft_trained_gives_its_logits_in_place(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llama(dtype=dtype)
    config = peft.ShiraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"])
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-1)
    for step in range(3):
        adapted(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path)
    wanted = logits(adapted)
    plain = llama(dtype=dtype)
    base = snapshot(plain)
    delta = from_shira(tmp_path, plain, task="shira")
    assert same(plain, base) and not torch.equal(logits(plain), wanted)
    with delta.applied(plain):
        assert torch.equal(logits(plain), wanted)
    assert same(plain, base)
    assert (delta.method, delta.task) == ("shira", "shira")
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, weight in merged.items():
        with delta.applied(plain):
            assert torch.equal(plain.get_parameter(name), weight)


def test_export_then_import_gives_the_delta_back(tmp_path: Path) -> None:
    model = llama(dtype=torch.bfloat16)
    delta = train_linear(model)
    to_shira(delta, model, tmp_path)
    delta.revert_(model)
    back = from_shira(tmp_path, model)
    assert back.base == "somebody/llama"
    assert list(back.indices) == list(delta.indices)
    for part in ("indices", "values", "base_values"):
        for name, tensor in getattr(delta, part).items():
            assert torch.equal(getattr(back, part)[name], tensor)
    assert back.fingerprint == delta.fingerprint


def test_shira_has_no_place_for_other_parameters(tmp_path: Path) -> None:
    model = llama()
    delta = train(model)
    others = [name for name in delta.indices if name not in linear_names(model)]
    with pytest.raises(ValueError, match=rf"got {len(others)} other parameters: .*embed_tokens"):
        to_shira(delta, model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    to_shira(delta, model, tmp_path / "a", skip=others)
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2 * (
        len(delta.indices) - len(others)
    )
    with pytest.raises(ValueError, match=r"must change a weight of an nn\.Linear"):
        to_shira(delta, model, tmp_path / "a", skip=delta.indices)
    other = gpt2()  # its linear layers are transposed Conv1D, which SHiRA does not know
    with pytest.raises(ValueError, match="other parameters"):
        to_shira(train(other), other, tmp_path / "b")


def test_changes_that_shira_cannot_hold(tmp_path: Path) -> None:
    two, changed = (
        nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(1, 9, bias=False)})
        for _ in range(2)
    )
    with pytest.raises(ValueError, match=r"needs 20 entries .* got 9 weights in 'b\.weight'"):
        to_shira(diff(two, changed), two, tmp_path)
    first, second = two["a"], changed["a"]
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="must be finite, got 1 of 1 that are not in 'weight'"):
        to_shira(diff(first, second), first, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, c: c.update(peft_type="LORA"), "must hold a SHIRA adapter, got 'LORA'"),
        (
            lambda t, c: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)}),
            "shira_. only",
        ),
        (lambda t, c: t.pop(next(iter(t))), "must have both of"),
        (lambda t, c: t.update({k: v + 1000 for k, v in t.items() if "ind" in k}), "outside"),
        (lambda t, c: t.update({k: v[:1] for k, v in t.items() if "ind" in k}), r"must be \[2, "),
        (
            lambda t, c: (
                t.update({"base_model.model.x.shira_weight": torch.ones(1)})
                or t.update({"base_model.model.x.shira_indices": torch.ones(2, 1).int()})
            ),
            "must have a matrix 'x.weight'",
        ),
    ],
)
def test_other_adapters_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    model = llama()
    to_shira(train_linear(model), model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        from_shira(tmp_path, model)


def test_missing_and_damaged_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold adapter_config\.json"):
        from_shira(tmp_path, llama())
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="is damaged"):
        from_shira(tmp_path, llama())


# -------------------------------------------------------------------------------------------- hub


def test_folder_round_trip(tmp_path: Path) -> None:
    delta = train(llama(), base="somebody/llama")
    path = delta.save_pretrained(tmp_path / "a" / "b")
    assert path.name == "piece_delta.safetensors"
    for source in (path.parent, str(path.parent), path):
        assert Delta.from_pretrained(source).digest == delta.digest
    card = path.with_name("README.md")
    assert 'base_model: "somebody/llama"\nlibrary_name: piece_ops' in card.read_text()
    card.write_text("mine")
    delta.save_pretrained(path.parent)
    assert card.read_text() == "mine"
    for missing in ("./none", "/none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="a folder, a file or a hub id"):
            Delta.from_pretrained(missing)


def test_upload_and_download_by_the_ordinary_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the calls that would reach the network are replaced."""
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **more: Any) -> None:
            seen["repo"] = (repo_id, more)

        def upload_folder(self, *, folder_path: str, **more: Any) -> str:
            seen["upload"] = more
            for path in Path(folder_path).iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return "address"

    def download(repo_id: str, filename: str, **more: Any) -> str:
        seen["download"] = (repo_id, more)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    delta = train(llama())
    assert delta.push_to_hub("me/task", private=True, token="t", revision="v1") == "address"
    assert seen["repo"] == ("me/task", {"private": True, "exist_ok": True})
    assert seen["upload"]["repo_id"] == "me/task" and seen["upload"]["revision"] == "v1"
    assert Delta.from_pretrained("me/task", revision="v1", token="t").digest == delta.digest
    assert seen["download"] == ("me/task", {"revision": "v1", "token": "t"})


def test_without_huggingface_hub_only_the_hub_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = train(llama())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    delta.save_pretrained(tmp_path)
    assert Delta.from_pretrained(tmp_path).digest == delta.digest
    with pytest.raises(ModuleNotFoundError, match=r"from_pretrained needs .* pip install hugg"):
        Delta.from_pretrained("me/task")
    with pytest.raises(ModuleNotFoundError, match="push_to_hub needs"):
        delta.push_to_hub("me/task")


# --------------------------------------------------------------------------- the format's own words


@pytest.mark.parametrize("kind", MODELS)
def test_ten_lines_of_torch_and_safetensors_apply_a_delta(kind: str, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert "piece_ops" not in code
    model = MODELS[kind]()
    base = snapshot(model)
    delta = train(model)
    trained = snapshot(model)
    delta.save(tmp_path / "task.safetensors")
    delta.revert_(model)
    names: dict[str, Any] = {"path": tmp_path / "task.safetensors", "model": model}
    exec(code, names)
    assert same(model, trained)
    delta.revert_(model)
    name, positions = next(iter(delta.indices.items()))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[positions[0]] += 1
    kept = snapshot(model)
    with pytest.raises(AssertionError):
        exec(code, names)
    assert same(model, kept) and not same(model, base)


def test_the_digest_is_as_the_format_says(tmp_path: Path) -> None:
    """Recomputed from the file alone, by the words of docs/delta_format.md."""
    import hashlib

    from safetensors import safe_open

    delta = train(llama(dtype=torch.bfloat16), task="täsk")
    delta.save(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        info = json.loads(file.metadata()["info"])
    stored = info.pop("sha256")
    sha = hashlib.sha256(json.dumps(info, sort_keys=True, separators=(",", ":")).encode())
    names = {torch.int32: "int32", torch.bfloat16: "bfloat16"}
    for key, tensor in sorted(load_file(tmp_path / "a").items()):
        sha.update(f"\n{key}\t{names[tensor.dtype]}\t{tensor.numel()}\n".encode())
        sha.update(tensor.view(torch.uint8).numpy().tobytes())
    assert sha.hexdigest() == stored == delta.digest
