"""Importance: every method against a plain loop, what it leaves behind, and bad input."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import piece_ops.importance.rules as rules
from piece_ops import reference
from piece_ops.importance import METHODS, Importance, estimate

from helpers.plain_importance import (
    BATCHES,
    OTHER_BATCHES,
    assert_same,
    embedding_names,
    plain_sums,
    plain_top,
    rows_of,
)
from helpers.tiny_models import MODELS, batch, gpt2, llama


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """These models are too small to share; a second thread only waits."""
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------- against plain torch


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_selection_equals_the_plain_loop(method: str, model_name: str) -> None:
    model = MODELS[model_name]()
    total = sum(p.numel() for p in model.parameters())
    k = max(1, int(0.01 * total))
    settings: dict[str, Any] = {"per_sample": "loop"}
    if method == "piece-g":
        settings["reference"] = OTHER_BATCHES
    got = estimate(model, BATCHES, method, density=0.01, seed=5, **settings)

    sums, squares = plain_sums(model, rows_of(BATCHES))
    _, kept = plain_sums(model, rows_of(OTHER_BATCHES))
    candidates = [n for n, _ in model.named_parameters() if n not in embedding_names(model)]
    weights = {n: p.detach().float() for n, p in model.named_parameters()}
    samples, kept_samples = len(rows_of(BATCHES)), len(rows_of(OTHER_BATCHES))
    elements = sum(kept[n].numel() for n in candidates)
    c = float(sum(kept[n].double().sum() for n in candidates)) / elements
    formulas = {
        "piece-f": lambda n: squares[n],
        "piece-s": lambda n: sums[n].abs() / (squares[n] + 1.0).sqrt(),
        "piece-g": lambda n: sums[n].abs() / (kept[n] + torch.tensor(c)),
        "magnitude": lambda n: weights[n].abs(),
        "gradient": lambda n: sums[n].abs(),
        "snip": lambda n: (sums[n] * weights[n]).abs(),
        "taylor": lambda n: squares[n] * (weights[n] * weights[n]),
    }
    if method == "random":
        score = reference.Score("random", {n: weights[n] for n in candidates}, seed=5)
        indices, threshold = plain_top(reference.score_values(score), k)
    else:
        indices, threshold = plain_top({n: formulas[method](n) for n in candidates}, k)
    assert (got.k, got.total, got.method) == (k, total, method)
    assert_same(got, indices)
    scale = {"piece-s": samples**-0.5, "piece-g": kept_samples / samples}
    scale |= dict.fromkeys(("piece-f", "gradient", "snip", "taylor"), 1 / samples)
    assert got.threshold == pytest.approx(threshold * scale.get(method, 1.0), rel=1e-6)


def test_threshold_and_xi_are_on_the_scale_of_means() -> None:
    model = llama()
    sums, squares = plain_sums(model, rows_of(BATCHES))
    names, n = [n for n in sums if n not in embedding_names(model)], len(rows_of(BATCHES))
    for xi in (1e-8, 1e-2):
        means = {m: (sums[m] / n).double() for m in names}
        fisher = {m: (squares[m] / n).double() for m in names}
        scores = {m: means[m].abs() / (fisher[m] + xi).sqrt() for m in names}
        got = estimate(model, BATCHES, "piece-s", k=40, xi=xi, per_sample="loop")
        _, threshold = plain_top(scores, 40)
        assert got.threshold == pytest.approx(threshold, rel=1e-5)
        for name, positions in got.indices.items():
            assert bool((scores[name].flatten()[positions] >= threshold * (1 - 1e-5)).all())


def test_right_padding_is_cut_off_and_changes_nothing_but_rounding() -> None:
    model = llama()
    padded = batch(4, 5, seed=4, pad=6)
    lengths: list[int] = []
    forward = model.model.embed_tokens.register_forward_pre_hook(
        lambda _m, args: lengths.append(args[0].shape[1])
    )
    importance = Importance(model, "piece-s", per_sample="loop")
    importance.update(padded)
    forward.remove()
    assert lengths == padded["attention_mask"].sum(1).tolist()
    sums, squares = plain_sums(model, rows_of([padded]))
    for name in importance.names:
        torch.testing.assert_close(importance._sums[name], sums[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            importance._square_sums[name], squares[name], rtol=1e-4, atol=1e-6
        )


def test_padding_is_kept_where_cutting_could_change_the_loss() -> None:
    model = llama()
    for change in ("left", "labelled", "own loss"):
        padded = batch(1, 5, seed=4)
        padded["attention_mask"][0, 0 if change == "left" else -1] = 0
        if change != "labelled":
            padded["labels"][0, -1] = -100
        lengths: list[int] = []
        hook = model.model.embed_tokens.register_forward_pre_hook(
            lambda _m, args, seen=lengths: seen.append(args[0].shape[1])
        )
        own = {"loss_fn": lambda m, b: m(**b).loss} if change == "own loss" else {}
        Importance(model, **own).update(padded)
        hook.remove()
        assert lengths == [5], change


def test_per_batch_takes_the_mean_gradient_of_the_batch_as_one_sample() -> None:
    model = llama()
    importance = Importance(model, "piece-f", per_sample=False)
    for one in BATCHES:
        importance.update(one)
    assert importance.sample_count == 2
    _, squares = plain_sums(model, BATCHES)
    for name in importance.names:
        assert torch.equal(importance._square_sums[name], squares[name])


@pytest.mark.parametrize("method", ["piece-f", "piece-s"])
def test_official_follows_the_released_code(method: str) -> None:
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    got = estimate(model, BATCHES, method, density=0.02, compat="official")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    sums, squares = plain_sums(model, BATCHES)
    hooked = {n: p for n, p in model.named_parameters() if n != "model.norm.weight"}
    assert got.total == sum(p.numel() for p in hooked.values())
    score = {n: squares[n] for n in hooked if "embed" not in n}
    if method == "piece-s":
        score = {n: sums[n].abs() / (squares[n] + 1).sqrt() for n in score}
    indices, threshold = plain_top(score, int(0.02 * got.total))
    assert_same(got, indices)
    assert got.threshold == pytest.approx(threshold, rel=1e-6)


def test_a_plain_module_with_its_own_loss_and_parameters_of_any_rank() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 3, 3)
            self.scale = nn.Parameter(torch.tensor(1.5))  # no dimension at all
            self.experts = nn.Parameter(torch.randn(2, 3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = self.convolution(x).mean((2, 3)) * self.scale
            return torch.einsum("bi,eij->bej", pooled, self.experts)

    net = Net()
    net.convolution.to(memory_format=torch.channels_last)
    x = torch.randn(4, 2, 6, 6)
    importance = Importance(net, "piece-f", loss_fn=lambda m, b: m(b[0]).square().mean())
    importance.update([x])
    for name, parameter in net.named_parameters():
        expected = torch.zeros(parameter.shape)
        for row in x.split(1):
            (gradient,) = torch.autograd.grad(net(row).square().mean(), parameter)
            expected += gradient * gradient
        torch.testing.assert_close(importance._square_sums[name], expected)
    assert importance.select(k=importance.candidate_count).k == importance.candidate_count


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain, checkpointed = llama(), llama()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    results = []
    for model in (plain, checkpointed):
        model.train()
        importance = Importance(model, "piece-s")
        importance.update(BATCHES[0])
        results.append(importance)
        assert model.training
    for name in results[0].names:
        assert torch.equal(results[0]._sums[name], results[1]._sums[name]), name


# -------------------------------------------------------------------------------------- candidates


def test_embeddings_count_but_are_chosen_only_when_asked_for() -> None:
    tied = llama(tied=True)
    assert "model.embed_tokens.weight" not in Importance(tied).names
    assert "lm_head.weight" not in Importance(tied).names
    assert Importance(tied).total == sum(p.numel() for p in tied.parameters())
    assert Importance(tied, embeddings=True).names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" in Importance(llama()).names
    assert not any("wte" in n or "wpe" in n for n in Importance(gpt2()).names)


def test_include_and_exclude_take_names_patterns_and_expressions() -> None:
    model = llama()
    by_pattern = Importance(model, include="*.mlp.*", exclude=re.compile(r"layers\.0"))
    assert set(by_pattern.names) == {
        f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")
    }
    assert Importance(model, include=["model.norm.weight"]).names == ("model.norm.weight",)
    model.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in Importance(model).names


def test_excluded_positions_are_not_chosen() -> None:
    model = llama()
    first = estimate(model, method="magnitude", k=30)
    second = estimate(model, method="magnitude", k=30, exclude_positions=first)
    third = estimate(model, method="magnitude", k=60)
    for name in third.indices:
        parts = [s.indices[name] for s in (first, second) if name in s.indices]
        assert torch.equal(torch.cat(parts).sort().values, third.indices[name])


# ----------------------------------------------------------------------------- what it leaves alone


def test_each_gradient_is_freed_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    seen: list[weakref.ref[torch.Tensor]] = []
    real = rules.accumulate_squares_

    def watched(squares: Any, grads: Any, sums: Any) -> None:
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(old() is None for old in seen)
        real(squares, grads, sums)
        seen.extend(weakref.ref(grad) for grad in grads.values())

    monkeypatch.setattr(rules, "accumulate_squares_", watched)
    importance = Importance(model, "piece-s", per_sample="loop")
    importance.update(BATCHES[0])
    assert len(seen) == 3 * len(importance.names)


def state_of(model: nn.Module) -> list[Any]:
    return [
        (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone(), p._version)
        for p in model.parameters()
    ]


def assert_untouched(model: nn.Module, before: list[Any]) -> None:
    for parameter, (required, grad, copy, version) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == required and parameter.grad is grad
        assert parameter._version == version
        assert grad is None or torch.equal(grad, copy)
        assert not parameter._post_accumulate_grad_hooks


def test_gradients_flags_and_hooks_of_the_caller_survive_also_an_error() -> None:
    model = llama()
    model(**BATCHES[0]).loss.backward()
    model.lm_head.weight.grad = None
    model.model.norm.weight.requires_grad_(False)
    before = state_of(model)
    importance = Importance(model, "piece-s")
    importance.update(BATCHES[0])
    assert_untouched(model, before)
    bad = dict(BATCHES[0], labels=torch.full_like(BATCHES[0]["labels"], -100))
    with pytest.raises(ValueError, match="loss of sample 3"):
        importance.update(bad)
    assert_untouched(model, before)
    assert not model.model.embed_tokens._forward_hooks


# ---------------------------------------------------------------------------------------- bad input


def test_a_sample_without_answer_says_so_and_adds_nothing() -> None:
    model = llama()
    importance = Importance(model)
    importance.update(BATCHES[0])
    before = {n: t.clone() for n, t in importance._square_sums.items()}
    bad = {key: value.clone() for key, value in BATCHES[0].items()}
    bad["labels"][0] = -100
    with pytest.raises(ValueError, match=r"sample 3 \(row 0 .*finite, got nan: all its labels"):
        importance.update(bad)
    assert importance.sample_count == 3
    assert all(torch.equal(before[n], t) for n, t in importance._square_sums.items())
    assert importance.select(k=3).k == 3


def test_a_gradient_that_is_not_finite_spoils_the_statistics_until_reset() -> None:
    model = llama()
    importance = Importance(model)
    hook = model.model.layers[0].self_attn.q_proj.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(ValueError, match=r"sample 0.*finite.*layers\.0\.self_attn\.q_proj\.weight"):
        importance.update(BATCHES[0])
    hook.remove()
    for call in (
        lambda: importance.update(BATCHES[0]),
        lambda: importance.select(k=1),
        lambda: importance.save("/nowhere"),
    ):
        with pytest.raises(RuntimeError, match=r"incomplete, call reset\(\)"):
            call()
    importance.reset()
    importance.update(BATCHES[0])
    assert importance.sample_count == 3


def test_bad_arguments_are_refused_with_their_reason() -> None:
    model, data = llama(), BATCHES[0]
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: Importance(model, "fisher"), ValueError, "method must be one of piece-f"),
        (lambda: Importance(model, xi=1.0), ValueError, "xi belongs to piece-s"),
        (lambda: Importance(model, "piece-s", xi=0.0), ValueError, "xi must be positive"),
        (lambda: Importance(model, compat="paper"), ValueError, "None or 'official'"),
        (lambda: Importance(model, "snip", compat="official"), ValueError, "exists for piece-f"),
        (lambda: Importance(model, reference="self"), ValueError, "reference belongs to piece-g"),
        (lambda: Importance(model, "piece-g", reference="no file"), FileNotFoundError, "no file"),
        (lambda: Importance(model, "piece-g", reference=7), TypeError, "got int"),
        (lambda: Importance(model, "piece-g", reference=data), TypeError, "in a list"),
        (
            lambda: Importance(model, include="*.nothing"),
            ValueError,
            "'\\*.nothing', which matches",
        ),
        (lambda: Importance(model, include="model.embed*"), ValueError, "pass embeddings=True"),
        (lambda: Importance(model, exclude=3), TypeError, "int"),
        (lambda: Importance(model, exclude="*"), ValueError, "must have candidates, got none"),
        (lambda: Importance("gpt2"), TypeError, "must be a torch.nn.Module, got str"),
        (lambda: Importance(model.double()), TypeError, "got torch.float64"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    model.float()
    cases = [
        (lambda: estimate(model, [], k=1), ValueError, "at least one batch, got none"),
        (lambda: estimate(model, None, k=1), TypeError, "iterable of batches, got NoneType"),
        (lambda: estimate(model, data, k=1), TypeError, "iterable of batches, got dict"),
        (lambda: estimate(model, [data], k=1, density=0.1), ValueError, "exactly one of"),
        (lambda: estimate(model, [data], density=0.0), ValueError, r"in \(0, 1\], got 0.0"),
        (lambda: estimate(model, [data], density=1.5), ValueError, r"in \(0, 1\], got 1.5"),
        (lambda: estimate(model, [data], k=2.0), TypeError, "k must be an int, got float"),
        (lambda: estimate(model, [data], k=-1), ValueError, "k must be in 0.."),
        (lambda: estimate(model, [data], k=10**9), ValueError, "k must be in 0..*got 1000000000"),
        (
            lambda: estimate(model, [data], "piece-g", k=1),
            ValueError,
            "needs a reference, got none",
        ),
        (lambda: estimate(model, [data], "piece-g", k=1, reference=[[]]), ValueError, "one batch"),
        (lambda: Importance(model).select(k=1), ValueError, "at least one sample is needed"),
        (lambda: Importance(model, "random").update(data), ValueError, "needs no data"),
        (lambda: Importance(model).update_reference(data), ValueError, "only method 'piece-g'"),
        (lambda: Importance(model).update([1, 2]), TypeError, "got list"),
        (lambda: Importance(model).update({}), ValueError, "at least one row"),
        (
            lambda: Importance(model).update({"input_ids": data["input_ids"]}),
            ValueError,
            "'labels'",
        ),
        (
            lambda: Importance(model, loss_fn=lambda m, b: m(**b).logits).update(data),
            ValueError,
            "tensor of one element, got shape",
        ),
        (
            lambda: Importance(model, loss_fn=lambda m, b: m(**b).loss.detach()).update(data),
            ValueError,
            "without gradient",
        ),
        (
            lambda: estimate(model, method="random", k=1, exclude_positions={"x": torch.ones(1)}),
            ValueError,
            "names no parameter: 'x'",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_all_frozen_is_no_candidates() -> None:
    with pytest.raises(ValueError, match="0 are trainable"):
        Importance(llama().requires_grad_(False))


def test_a_progress_bar_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"piece_ops\[train\]"):
        estimate(llama(), BATCHES, k=1, progress=True)


def test_a_progress_bar_shows_the_batches(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"reference": "self", "reference_samples": 2, "reference_tokens": 3}
    estimate(llama(), BATCHES, "piece-g", k=1, progress=True, **settings)
    shown = capsys.readouterr().err
    assert "importance" in shown and "self texts" in shown and "1/1" in shown
