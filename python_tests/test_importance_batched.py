"""Per-sample importance from one batched backward: every model family, every kind of batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piece_ops.importance import Importance, estimate

from helpers.model_zoo import ZOO, images, mixtral, packed, vit, words
from helpers.per_sample import assert_true_sums, clear_k, rows_of, true_gradients
from helpers.tiny_models import batch, gpt2, llama
from helpers.tolerances import PER_SAMPLE_GRADIENT, PER_SAMPLE_GRADIENT_BF16


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """These models are too small to share; a second thread only waits."""
    torch.set_num_threads(1)


def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts full backward passes."""
    seen: list[int] = []
    real = Tensor.backward

    def counted(self: Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(1)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "backward", counted)
    return seen


# ------------------------------------------------------------------------------- model families


@pytest.mark.parametrize("name", ZOO)
def test_one_backward_gives_every_samples_own_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, data = ZOO[name]
    model, first, second = make(), data(seed=1), data(seed=2)
    importance = Importance(model, "piece-s", embeddings=True)
    importance.update(first)
    seen = backwards(monkeypatch)
    importance.update(second)
    assert len(seen) == 1 and importance.looped == {}
    rows = rows_of(first) + rows_of(second)
    assert importance.sample_count == len(rows)
    assert_true_sums(importance, true_gradients(model, rows), PER_SAMPLE_GRADIENT)


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "bert", "vit", "mixtral", "llava"])
def test_bfloat16(name: str) -> None:
    make, data = ZOO[name]
    model, given = make().to(torch.bfloat16), data(seed=1)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    importance = Importance(model, "piece-s", embeddings=True)
    importance.update(given)
    assert importance.looped == {}
    truth = true_gradients(model, rows_of(given))
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT_BF16)


@pytest.mark.parametrize("name", ZOO)
def test_the_selection_is_that_of_the_loop(name: str) -> None:
    make, data = ZOO[name]
    model, batches = make(), [data(seed=1), data(seed=2)]
    loop = Importance(model, "piece-f", embeddings=True, per_sample="loop")
    for one in batches:
        loop.update(one)
    k = clear_k(loop, loop.total // 100)
    got = estimate(model, batches, "piece-f", k=k, embeddings=True)
    wanted = loop.select(k=k)
    assert list(got.indices) == list(wanted.indices)
    assert all(torch.equal(got.indices[n], wanted.indices[n]) for n in wanted.indices)


@pytest.mark.parametrize("method", ["piece-f", "piece-s", "piece-g", "gradient"])
def test_every_kind_of_accumulator(method: str) -> None:
    model, given = llama(tied=True), words(seed=1)
    importance = Importance(model, method, embeddings=True)
    importance.update(given)
    truth = true_gradients(model, rows_of(given))
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)
    if method == "piece-g":
        importance.update_reference(given)
        loop = Importance(model, "piece-f", embeddings=True, per_sample="loop")
        loop.update(given)
        for name in loop.names:
            error = PER_SAMPLE_GRADIENT * float(loop._square_sums[name].max())
            got = importance._reference[name]
            torch.testing.assert_close(got, loop._square_sums[name], rtol=error, atol=error)


# ------------------------------------------------------------------------------ kinds of batches


def flipped(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Left padding."""
    return {key: value.flip(1) for key, value in data.items()}


def test_left_padding() -> None:
    model, given = llama(), flipped(words(seed=1))
    importance = Importance(model, "piece-s")
    importance.update(given)
    assert importance.looped == {}
    assert_true_sums(importance, true_gradients(model, rows_of(given)), PER_SAMPLE_GRADIENT)


@pytest.mark.parametrize("lengths", [[[5, 8, 3, 6]], [[5, 8], [9, 4]]])
def test_packed_rows_are_one_sample_per_sequence(lengths: list[list[int]]) -> None:
    model = llama(tied=True)
    singles = [[batch(1, n, seed=n) for n in row] for row in lengths]
    for row in singles:
        for one in row:  # its first label is nobody's to predict
            one["labels"] = one["input_ids"].clone()
    rows = [packed(row) for row in singles]
    given = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    before = given["labels"].clone()
    samples = [one for row in singles for one in row]
    truth = true_gradients(model, samples)
    for how in (True, "loop"):
        importance = Importance(model, "piece-s", embeddings=True, per_sample=how)
        importance.update(given)
        assert importance.sample_count == len(samples) and importance.looped == {}
        assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)
    assert torch.equal(given["labels"], before) and model.config.use_cache


def test_a_packed_batch_that_the_model_does_not_keep_apart_goes_by_the_loop() -> None:
    model, singles = llama(), [batch(1, n, seed=n) for n in (5, 7)]
    given = packed(singles)
    given["attention_mask"] = torch.ones_like(given["input_ids"])  # transformers then sees one row
    importance = Importance(model, "piece-s")
    importance.update(given)
    assert "couples samples" in importance.looped["lm_head.weight"]
    assert_true_sums(importance, true_gradients(model, singles), PER_SAMPLE_GRADIENT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_gradient_checkpointing(reentrant: bool, embeddings: bool) -> None:
    model, given = llama(tied=True), words(seed=1)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    importance = Importance(model, "piece-s", embeddings=embeddings)
    importance.update(given)
    assert importance.looped == {} and model.training
    truth = true_gradients(copy.deepcopy(model).eval(), rows_of(given))
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_autocast(name: str) -> None:
    make, data = ZOO[name]
    model, given = make(), data(seed=1)

    def loss_fn(model: nn.Module, given: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**given).loss

    inside = Importance(model, "piece-s", loss_fn=loss_fn)
    inside.update(given)
    outside = Importance(model, "piece-s")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside.update(given)
    truth = true_gradients(model, rows_of(given))
    for importance in (inside, outside):
        assert importance.looped == {}
        assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT_BF16)


def test_rows_of_one_length_and_pictures_need_no_labels_per_token() -> None:
    model, given = vit(), images(seed=3)

    def loss_fn(model: nn.Module, given: Any) -> Tensor:
        return nn.functional.cross_entropy(model(given[0]).logits, given[1])

    importance = Importance(model, "piece-s", loss_fn=loss_fn)
    importance.update([given["pixel_values"], given["labels"]])
    truth = true_gradients(model, rows_of(given))
    assert importance.looped == {}
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


# ---------------------------------------------------------------------------------- conventions


def token_losses(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    labels = given["labels"][:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return losses, (labels != -100).sum(1)


def sum_of_tokens(model: Any, given: dict[str, Tensor]) -> Tensor:
    return token_losses(model, given)[0].sum()


def mean_of_rows(model: Any, given: dict[str, Tensor]) -> Tensor:
    losses, counts = token_losses(model, given)
    return (losses.sum(1) / counts).mean()


def mean_of_tokens(model: Any, given: dict[str, Tensor]) -> Tensor:
    losses, counts = token_losses(model, given)
    return losses.sum() / counts.sum()


def weighted(model: Any, given: dict[str, Tensor]) -> Tensor:
    """By the square root of the number of tokens: no convention that is known."""
    losses, counts = token_losses(model, given)
    return (losses.sum(1) / counts.sqrt()).sum() / counts.sqrt().sum()


@pytest.mark.parametrize("loss_fn", [sum_of_tokens, mean_of_rows, mean_of_tokens, weighted])
def test_the_losss_convention_is_found_by_number(loss_fn: Any) -> None:
    model, given = llama(), words(seed=1)
    importance = Importance(model, "piece-s", loss_fn=loss_fn)
    importance.update(given)
    assert (importance.looped != {}) == (loss_fn is weighted)
    if loss_fn is weighted:
        assert "no mean or sum" in importance.looped["lm_head.weight"]
    truth = true_gradients(model, rows_of(given), loss_fn)
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


def test_a_convention_that_a_batch_leaves_open_is_settled_by_the_next() -> None:
    model, equal, unequal = llama(), batch(3, 7, seed=1), words(seed=2)
    importance = Importance(model, "piece-s", loss_fn=mean_of_rows)
    importance.update(equal)  # as many answer tokens in each row: tokens or rows, who knows
    importance.update(unequal)
    assert importance.looped == {}
    truth = true_gradients(model, rows_of(equal) + rows_of(unequal), mean_of_rows)
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


def contrastive(model: Any, given: dict[str, Tensor]) -> Tensor:
    states = model.model(given["input_ids"], given["attention_mask"]).last_hidden_state[:, -1]
    # Scaled, or each row's product with itself outweighs all others and there is no coupling left.
    return torch.logsumexp(states @ states.T / states.shape[-1], 1).mean()


def test_a_loss_that_couples_samples_goes_by_the_loop_and_says_so() -> None:
    model, given = llama(), batch(4, 7, seed=1)
    importance = Importance(model, "piece-s", loss_fn=contrastive)
    importance.update(given)
    assert set(importance.looped) == set(importance.names)
    assert "couples samples" in importance.looped["model.norm.weight"]
    truth = true_gradients(model, rows_of(given), contrastive)
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


def test_a_load_balancing_loss_goes_by_the_loop() -> None:
    model = mixtral()
    model.config.output_router_logits = True
    importance = Importance(model, "piece-f")
    importance.update(words(seed=1))
    assert "load balancing" in importance.looped["model.norm.weight"]


def test_dropout_goes_by_the_loop() -> None:
    model = gpt2().train()
    importance = Importance(model, "piece-f")
    importance.update(words(seed=1))
    assert "dropout" in importance.looped["transformer.ln_f.weight"]
    assert importance.sample_count == 4


def test_one_row_or_equal_rows_teach_nothing_and_go_by_the_loop() -> None:
    model = llama()
    twice = {key: value.repeat(2, 1) for key, value in batch(1, 7).items()}
    importance = Importance(model, "piece-s")
    importance.update(batch(1, 7))
    assert importance.looped == {}  # of one sample there is nothing to say
    importance.update(twice)
    assert "no two samples" in importance.looped["lm_head.weight"]
    truth = true_gradients(model, rows_of(batch(1, 7)) * 3)
    assert_true_sums(importance, truth, PER_SAMPLE_GRADIENT)


def slightly_coupled(model: Any, given: dict[str, Tensor]) -> Tensor:
    """A sample's loss counts by up to 25 % more, by what is in the rows beside it."""
    logits = model(given["input_ids"], given["attention_mask"]).logits.float()
    own = logits.logsumexp(-1).mean(1)
    kind = (given["input_ids"][:, 0] % 2).float()
    others = (kind.sum() - kind) / max(len(kind) - 1, 1)
    return (own * (1.0 + 0.25 * others)).mean()


def test_half_precision_does_not_hide_a_coupling_of_a_fifth() -> None:
    """It stays below what rounding may do, beside one sample, but not beside two others."""
    model, given = llama(dtype=torch.bfloat16), batch(4, 7, seed=1)
    given["input_ids"][:, 0] = torch.tensor([4, 4, 5, 4])
    importance = Importance(model, "piece-s", loss_fn=slightly_coupled)
    importance.update(given)
    assert "depends on which other sample" in importance.looped["model.norm.weight"]
