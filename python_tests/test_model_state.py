"""PieceModel's state dict and saved deltas: small, exact, refused where they do not belong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from piece_ops.delta import Delta
from piece_ops.model import PieceModel
from piece_ops.optim import SparseAdamW
from piece_ops.selection import Selection

from helpers.tiny_models import MODELS, batch, llama, random_positions

DATA = batch(3, 7, seed=1)
PROMPT = DATA["input_ids"][:1, :3]


def select(model: nn.Module, density: float = 0.05, seed: int = 0) -> Selection:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    return Selection(random_positions(model, density, seed), shapes, total, "random")


def wrap(seed: int = 0, **settings: Any) -> PieceModel:
    model = llama(**settings)
    return PieceModel(model, select(model, seed=seed))


def train(model: nn.Module, steps: int = 3, lr: float = 3e-2) -> None:
    optimizer = SparseAdamW(model.parameters(), lr=lr)
    for step in range(steps):
        model(**batch(3, 7, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]), key


# -------------------------------------------------------------------------------------- state dict


@pytest.mark.parametrize("model_name", MODELS)
def test_a_state_dict_holds_what_training_changes_and_loads_into_the_base(
    model_name: str, tmp_path: Path
) -> None:
    trained, fresh = (
        PieceModel(m, select(m)) for m in (MODELS[model_name](), MODELS[model_name]())
    )
    train(trained)
    state = trained.state_dict()
    names = list(trained.selection.indices)
    wanted = [f"{kind}.{name}" for kind in ("values", "positions") for name in names]
    assert sorted(state) == sorted([*wanted, "base"])
    for name, positions in trained.selection.indices.items():
        assert state[f"values.{name}"].dtype == torch.float32
        assert state[f"positions.{name}"].dtype == torch.int32
        assert torch.equal(state[f"positions.{name}"].long(), positions)
    save_file(state, tmp_path / "state.safetensors")  # refuses tensors that share memory
    base = copies(fresh.state_dict())
    result = fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(trained.model.state_dict(), fresh.model.state_dict())
    assert_same(trained.state_dict(), fresh.state_dict())
    fresh.load_state_dict(base)
    assert_same(MODELS[model_name]().state_dict(), fresh.model.state_dict())


def test_under_another_module_the_keys_have_its_prefix() -> None:
    trained, fresh = nn.Sequential(wrap()), nn.Sequential(wrap())
    train(trained[0])
    state = trained.state_dict()
    assert "0.base" in state and not any(key.startswith("0.model") for key in state)
    result = fresh.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(trained[0].model.state_dict(), fresh[0].model.state_dict())


def test_buffers_and_unfrozen_parameters_are_kept() -> None:
    def make() -> PieceModel:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        net.append(nn.Linear(4, 4))
        net[3].weight = net[2].weight  # tied
        chosen = Selection({"0.weight": torch.tensor([1, 5])}, {"0.weight": (4, 4)}, 48)
        wrapped = PieceModel(net, chosen)
        net[2].weight.requires_grad_(True)
        return wrapped

    trained, fresh = make(), make()
    with torch.no_grad():
        trained.model[2].weight.add_(1.0)
        trained(torch.randn(8, 4))  # moves the batch norm's statistics
        trained.values.get_parameter("0.weight").add_(1.0)
    state = trained.state_dict()
    assert [key for key in state if key.startswith("model.")] == [
        "model.1.running_mean",
        "model.1.running_var",
        "model.1.num_batches_tracked",
        "model.2.weight",
    ]
    fresh.load_state_dict(copies(state))
    assert_same(trained.model.state_dict(), fresh.model.state_dict())
    del state["model.2.weight"], state["model.1.running_var"]
    result = fresh.load_state_dict(state, strict=False)
    assert result.missing_keys == ["model.1.running_var", "model.2.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_of_all_weights_still_loads(tied: bool) -> None:
    trained, fresh = wrap(tied=tied), wrap(tied=tied)
    train(trained)
    state = {key: v for key, v in copies(trained.state_dict()).items() if "values." in key}
    dense = {f"model.{key}": v for key, v in copies(trained.model.state_dict()).items()}
    if tied:
        del dense["model.lm_head.weight"]
    result = fresh.load_state_dict({**state, **dense})
    assert not result.missing_keys
    assert_same(trained.model.state_dict(), fresh.model.state_dict())


def test_what_is_missing_is_said() -> None:
    model = wrap()
    result = model.load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == sorted(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*base"):
        model.load_state_dict({})


def test_a_state_of_another_selection_or_base_is_refused_before_anything_is_written() -> None:
    trained = wrap()
    train(trained)
    state = copies(trained.state_dict())
    name = "model.norm.weight"
    moved, longer, short, lacking = ({**state} for _ in range(4))
    moved[f"positions.{name}"] = (state[f"positions.{name}"] + 1) % 24
    longer["positions.nothing"] = torch.tensor([0], dtype=torch.int32)
    short[f"values.{name}"] = state[f"values.{name}"][:0]
    del lacking[f"positions.{name}"], lacking[f"values.{name}"]
    cases = [
        (wrap(), moved, rf"1 parameters that differ \('{name}': 0 of 1, and 1 others\)"),
        (wrap(), longer, r"'nothing': no selected coordinates here"),
        (wrap(), short, rf"'{name}': values for 1 positions, shape \[0\]"),
        (wrap(), lacking, rf"'{name}': none of 1"),
        (wrap(seed=1), state, r"parameters that differ \(.*; and \d+ more\)"),
        (PieceModel(llama(seed=5), trained.selection), state, "had other weights at the"),
        (wrap(), {k: v for k, v in state.items() if k != "base"}, "had other weights at the"),
        (wrap(dtype=torch.bfloat16), state, "had other weights at the"),
    ]
    for model, given, message in cases:
        before = copies(model.model.state_dict())
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(given, strict=False)
        assert_same(before, model.model.state_dict())
    with pytest.raises(RuntimeError, match="assign must be False"):
        wrap().load_state_dict(state, assign=True)
    trained.unload()
    with pytest.raises(RuntimeError, match="has been unloaded"):
        trained.load_state_dict(state)


# ---------------------------------------------------------------------------------- saved as PEFT's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_writes_a_delta_that_from_pretrained_goes_on_with(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    trained = wrap(dtype=dtype)
    train(trained, lr=1e-4)  # so small that bfloat16 weights stay what they were, here and there
    path = trained.save_pretrained(tmp_path / "adapter", task="mail")
    assert path.name == "piece_delta.safetensors" and Delta.load(path).task == "mail"
    assert path.stat().st_size < 40_000
    base = llama(dtype=dtype)
    loaded = PieceModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.model is base
    assert_same(trained.model.state_dict(), base.state_dict())
    assert loaded.selection.k == trained.selection.k
    train(loaded)
    delta = loaded.delta()
    plain = loaded.merge_and_unload()
    assert plain is base and type(plain.lm_head) is nn.Linear
    plain.save_pretrained(tmp_path / "whole")
    whole = type(plain).from_pretrained(tmp_path / "whole", dtype=dtype)
    assert_same(plain.state_dict(), whole.state_dict())
    delta.revert_(whole)  # all that was trained, before and after from_pretrained
    assert_same(llama(dtype=dtype).state_dict(), whole.state_dict())


def test_push_to_hub_uploads_what_save_pretrained_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def upload(delta: Delta, repo_id: str, **settings: Any) -> str:
        sent.append((delta.digest, repo_id, settings))
        return "address"

    monkeypatch.setattr(Delta, "push_to_hub", upload)
    trained = wrap()
    train(trained)
    saved = Delta.load(trained.save_pretrained(tmp_path))
    assert trained.push_to_hub("somebody/mail", private=True) == "address"
    assert sent == [(saved.digest, "somebody/mail", {"private": True})]


def test_from_pretrained_leaves_another_base_alone(tmp_path: Path) -> None:
    trained = wrap()
    train(trained)
    trained.save_pretrained(tmp_path)
    other = llama(seed=3)
    before = copies(other.state_dict())
    with pytest.raises(ValueError, match="must hold the base values"):
        PieceModel.from_pretrained(other, tmp_path)
    assert_same(before, other.state_dict())
    with pytest.raises(FileNotFoundError, match="no folder of this machine"):
        PieceModel.from_pretrained(other, str(tmp_path / "nothing"))


def test_from_pretrained_takes_the_delta_back_when_the_model_cannot_be_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, base = wrap(), llama()
    train(trained)
    trained.save_pretrained(tmp_path)
    monkeypatch.setattr("piece_ops.model.inject", lambda targets: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PieceModel.from_pretrained(base, tmp_path)
    assert_same(llama().state_dict(), base.state_dict())


def test_generate_works_wrapped_and_unloaded() -> None:
    wrapped = wrap()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = wrapped.generate(input_ids=PROMPT, **settings)
    values = list(wrapped.values.parameters())
    with torch.no_grad():
        for one in values:
            one.mul_(-2.0)  # not an optimizer of ours: generate() has to see it
    after = wrapped.generate(input_ids=PROMPT, **settings)
    plain = wrapped.merge_and_unload()
    assert torch.equal(plain.generate(input_ids=PROMPT, **settings), after)
    assert not torch.equal(before, after)


# ------------------------------------------------------------------------------- selecting again


def test_selecting_again_keeps_what_was_trained_and_one_delta() -> None:
    wrapped = wrap()
    model = wrapped.model
    head = model.lm_head
    train(wrapped)
    old = copies(model.state_dict())
    wrapped.reselect_(lambda plain: select(plain, 0.02, seed=9))
    assert wrapped.selection.k < 0.03 * wrapped.selection.total
    assert_same(old, model.state_dict())
    assert head is wrapped.lm_head and not head._parameters["weight"].requires_grad
    train(wrapped)
    delta = wrapped.delta(task="both")
    assert delta.task == "both" and delta.method == "random"
    state = wrapped.state_dict()
    plain = wrapped.unload()
    delta.revert_(plain)
    assert_same(llama().state_dict(), plain.state_dict())
    again = PieceModel(plain, select(plain, 0.02, seed=9))
    with pytest.raises(RuntimeError, match="or that has selected again since"):
        again.load_state_dict(state)


def test_a_failed_selection_changes_nothing() -> None:
    wrapped = wrap()
    wrapped.model.model.norm._parameters["weight"].requires_grad_(True)
    optimizer = SparseAdamW(wrapped.values.parameters(), lr=1e-2)
    twin = copy.deepcopy(wrapped)

    def fail(model: nn.Module) -> Selection:
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        wrapped.reselect_(fail)
    with pytest.raises(TypeError, match="selection must be a Selection, got NoneType"):
        wrapped.reselect_(lambda model: None)  # type: ignore[arg-type,return-value]
    assert wrapped.model.model.norm._parameters["weight"].requires_grad
    wrapped(**DATA).loss.backward()
    optimizer.step()
    twin(**DATA).loss.backward()
    SparseAdamW(twin.values.parameters(), lr=1e-2).step()
    assert_same(twin.state_dict(), wrapped.state_dict())
