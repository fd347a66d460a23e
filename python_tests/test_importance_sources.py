"""What an importance pass keeps (reference sources), and statistics on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from piece_ops.importance import Importance, estimate

from helpers.plain_importance import (
    BATCHES,
    OTHER_BATCHES,
    assert_same,
    plain_sums,
    plain_top,
    rows_of,
)
from helpers.tiny_models import llama


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """These models are too small to share; a second thread only waits."""
    torch.set_num_threads(1)


# --------------------------------------------------------------------------------------- reference


def test_reference_sources_enter_as_means(tmp_path: Path) -> None:
    model = llama()
    stored = Importance(model, "piece-f")
    stored.update(BATCHES[1])
    stored.save(tmp_path / "task.safetensors")
    path = tmp_path / "task.safetensors"
    importance = Importance(model, "piece-g", reference=[OTHER_BATCHES, stored, path])
    importance.update(BATCHES[0])
    got = importance.select(k=50)

    sums, _ = plain_sums(model, rows_of(BATCHES[:1]))
    _, one = plain_sums(model, rows_of(OTHER_BATCHES))
    _, two = plain_sums(model, rows_of(BATCHES[1:]))
    fisher = {n: (one[n] / 4 + two[n] / 2) + two[n] / 2 for n in importance.names}
    c = sum(float(f.double().sum()) for f in fisher.values()) / importance.candidate_count
    scores = {n: sums[n].abs() / (fisher[n] + torch.tensor(c)) for n in importance.names}
    indices, threshold = plain_top(scores, 50)
    assert_same(got, indices)
    assert got.threshold == pytest.approx(threshold / 3, rel=1e-6)


def test_an_open_and_a_finished_reference_add_up() -> None:
    model = llama()
    both, finished = Importance(model, "piece-g"), Importance(model, "piece-g")
    for importance in (both, finished):
        importance.update(BATCHES[0])
        importance.update_reference(BATCHES[1])
        importance.finish_reference()
        importance.update_reference(OTHER_BATCHES[0])
    finished.finish_reference()
    one, two = both.select(k=30), finished.select(k=30)
    assert_same(one, two.indices)
    assert one.threshold == two.threshold


def test_self_reference_is_repeatable_and_leaves_random_state_and_modes_alone() -> None:
    model = llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    texts: list[torch.Tensor] = []
    watch = model.register_forward_pre_hook(
        lambda _m, _a, kw: texts.append(kw["labels"]) if kw.get("labels") is not None else None,
        with_kwargs=True,
    )
    settings = {"reference": "self", "reference_samples": 5, "reference_tokens": 6}
    settings["per_sample"] = "loop"  # so that each text can be seen by itself
    first = estimate(model, BATCHES, "piece-g", k=20, **settings)
    watch.remove()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    torch.manual_seed(99)
    again = estimate(model, BATCHES, "piece-g", k=20, **settings)
    assert_same(first, again.indices)
    other = estimate(model, BATCHES, "piece-g", k=20, seed=1, **settings)
    assert other.threshold != first.threshold
    sampled = texts[:5]
    for text in sampled:  # BOS, then every sampled token labelled, ending with the first EOS
        assert text[0, 0] == 1 and text.shape[0] == 1 and 2 <= text.shape[1] <= 7
        assert 2 not in text[0, 1:-1].tolist()


def test_self_reference_needs_a_model_that_writes() -> None:
    layer = nn.Linear(2, 2)
    importance = Importance(layer, "piece-g", loss_fn=lambda m, b: m(b).sum(), reference="self")
    with pytest.raises(ValueError, match=r"reference='self' needs a model with generate\(\)"):
        importance.run_reference()
    model = llama()
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"):
        estimate(model, BATCHES, "piece-g", k=1, reference="self")


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("method", ["piece-f", "piece-s", "piece-g", "random"])
def test_saved_statistics_go_on_as_if_nothing_had_happened(method: str, tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "statistics.safetensors"
    whole = Importance(model, method, seed=3)
    half = Importance(model, method, seed=3)
    for importance in (whole, half):
        if method == "piece-g":
            importance.update_reference(OTHER_BATCHES[0])
            importance.finish_reference()
            importance.update_reference(BATCHES[1])
        if method != "random":
            importance.update(BATCHES[0])
    half.save(path)
    loaded = Importance.load(path, model)
    assert loaded.sample_count == half.sample_count and loaded.names == half.names
    if method != "random":
        whole.update(BATCHES[1])
        loaded.update(BATCHES[1])
    assert_same(loaded.select(k=25), whole.select(k=25).indices)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    importance = Importance(llama())
    importance.update(BATCHES[0])
    importance.save(path)
    with pytest.raises(ValueError, match=r"must fit the model.*q_proj\.weight' .*model: none"):
        Importance.load(path, nn.Linear(2, 2))
    other = llama()
    other.lm_head = nn.Linear(24, 7, bias=False)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' \[61, 24\] \(model: \[7, 24\]\)"):
        Importance.load(path, other)
    only_norm = Importance(llama(), include="model.norm.weight")
    only_norm.update(BATCHES[0])
    with pytest.raises(ValueError, match="cover every candidate"):
        Importance(llama(), "piece-g").add_reference(only_norm)
    no_squares = Importance(llama(), "gradient")
    with pytest.raises(ValueError, match="must hold square sums"):
        Importance(llama(), "piece-g").add_reference(no_squares)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    importance = Importance(llama())
    importance.update(BATCHES[0])
    importance.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Importance.load(path, llama())
    estimate(llama(), method="magnitude", k=3).save(path)
    with pytest.raises(ValueError, match=r"must hold 'piece_ops\.importance'"):
        Importance.load(path, llama())
    with pytest.raises(FileNotFoundError, match="wanted a file"):
        Importance.load(tmp_path / "none", llama())


def test_saving_fails_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "statistics.safetensors"
    importance = Importance(llama())
    importance.update(BATCHES[0])
    importance.save(path)
    content = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("piece_ops._files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        importance.save(path)
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 1
