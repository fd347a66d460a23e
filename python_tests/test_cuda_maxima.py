"""Maxima of chunks from accumulation to selection, one wait a backward: on emulated kernels."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import piece_ops
from piece_ops.backends import cuda, cuda_reports, cuda_select_topk
from piece_ops.backends.cuda_maxima import ChunkMaxima
from piece_ops.selection import Selection

from helpers.cases import BF16, F32, draw
from helpers.compare import assert_bits_equal
from helpers.emulated import EmulatedRuntime, build, emulation, load, route_cpu_tensors
from helpers.plain_importance import BATCHES
from helpers.tiny_models import llama

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
)
SIZES = (40_000, 0, 4097, 31)


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return load(build("plain"))


@pytest.fixture
def emulated(extension: ModuleType) -> Iterator[EmulatedRuntime]:
    """Inside, piece_ops.<op> runs emulated kernels, Importance as on a GPU."""
    extension.set_device(2, 2)
    with emulation(extension) as runtime:
        library = route_cpu_tensors()
        yield runtime
    library._destroy()


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The maxima that each selection was given."""
    seen: list[list[Tensor]] = []
    plan_of = cuda_select_topk._plan_of

    def watched(place: Any, given: Any, *recalled: Any) -> Any:
        seen.append(given.maxima)
        return plan_of(place, given, *recalled)

    monkeypatch.setattr(cuda_select_topk, "_plan_of", watched)
    return seen


def accumulators(g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.zeros(n) for n in SIZES], [torch.zeros(n) for n in SIZES]


def gradients(g: torch.Generator) -> list[Tensor]:
    return [draw("normal", n, BF16 if n % 2 else F32, g) for n in SIZES]


def score(kind: str, squares: list[Tensor], sums: list[Tensor], constant: float) -> Any:
    if kind == "plain":
        return squares
    second = squares if kind == "piece-s" else None
    return piece_ops.Score(kind, sums, second, constant=constant)


@pytest.mark.parametrize("kind", ["plain", "piece-s", "magnitude"])
def test_the_selection_is_the_same(
    emulated: Any, selections: Any, kind: str, rng: torch.Generator
) -> None:
    """After several accumulations; the statistics' own order of ties, positions excluded too."""
    squares, sums = accumulators(rng)
    maxima = ChunkMaxima(kind, constant=0.5 if kind == "piece-s" else 0.0)
    for _ in range(3):
        piece_ops.accumulate_squares_(squares, gradients(rng), sums, 0.5, maxima=maxima)
    exclude = [torch.arange(0, n, 7) for n in SIZES]
    for k in (0, 1, 50, 3000):
        for excluded in (None, exclude):
            ranked = score(kind, squares, sums, 0.5)
            want = piece_ops.select_topk(ranked, k, exclude=excluded)
            selections.clear()
            got = piece_ops.select_topk(ranked, k, exclude=excluded, maxima=maxima)
            (used,) = selections
            assert all(bool(x.isfinite().all()) for x in used), "not all maxima were known"
            for a, b in zip(got.indices, want.indices, strict=True):
                assert_bits_equal(a, b, f"{kind} {k}")
            assert (got.threshold, got.ties_kept) == (want.threshold, want.ties_kept)


def test_what_somebody_else_wrote_is_read_whole(
    emulated: Any, selections: Any, rng: torch.Generator
) -> None:
    squares, _ = accumulators(rng)
    maxima = ChunkMaxima()
    piece_ops.accumulate_squares_(squares, gradients(rng), maxima=maxima)
    squares[2][4000] += 1e6
    selections.clear()
    top = piece_ops.select_topk(squares, 1, maxima=maxima)
    assert top.indices[2].tolist() == [4000]
    (used,) = selections
    assert [bool(x.isinf().all()) for x in used if x.numel()] == [False, True, False]
    squares[0][7] += 2e6  # most of all: then the ordinary selection
    selections.clear()
    assert piece_ops.select_topk(squares, 1, maxima=maxima).indices[0].tolist() == [7]
    assert selections == [[]]


def test_maxima_fit_only_what_they_were_made_for(emulated: Any, rng: torch.Generator) -> None:
    squares, sums = accumulators(rng)
    maxima = ChunkMaxima("piece-s", constant=0.5)
    piece_ops.accumulate_squares_(squares, gradients(rng), sums, maxima=maxima)
    assert maxima.of(sums, squares, "piece-s", 0.5)
    assert maxima.of(sums, squares, "piece-s", 2.0)  # smaller scores: still bounds
    assert not maxima.of(sums, squares, "piece-s", 0.25)
    assert not maxima.of(sums, squares, "piece-g", 0.5)
    assert not maxima.of([x.clone() for x in sums], squares, "piece-s", 0.5)
    assert not maxima.of(sums, [x.clone() for x in squares], "piece-s", 0.5)
    squares[0].mul_(0.25)  # the second statistic alone
    assert not maxima.of(sums, squares, "piece-s", 0.5)
    # A replay writes without counting: nothing is believed on that device any more.
    maxima = ChunkMaxima()
    piece_ops.accumulate_squares_(squares, gradients(rng), maxima=maxima)
    assert maxima.of(squares, [], "plain", 0.0)
    emulated.captures = True
    piece_ops.accumulate_squares_(squares, gradients(rng))
    emulated.captures = False
    assert not maxima.of(squares, [], "plain", 0.0)


@pytest.mark.parametrize("kind", ["plain", "piece-s"])
def test_lists_and_parts_of_them_in_turn(
    emulated: Any, selections: Any, kind: str, rng: torch.Generator
) -> None:
    """All tensors, one of them, some in another order: what was left last is what counts."""
    squares, sums = accumulators(rng)
    maxima = ChunkMaxima(kind, constant=0.5 if kind == "piece-s" else 0.0)
    for order in ((0, 1, 2, 3), (0, 1, 2, 3), (2,), (3, 0), (0, 1, 2, 3), (0, 2), (0, 1, 2, 3)):
        grads = gradients(rng)
        lists = ([x[t] for t in order] for x in (squares, grads, sums))
        piece_ops.accumulate_squares_(*lists, 0.5, maxima=maxima)
        ranked = score(kind, squares, sums, 0.5)
        want = piece_ops.select_topk(ranked, 60)
        selections.clear()
        got = piece_ops.select_topk(ranked, 60, maxima=maxima)
        (used,) = selections
        assert len(used) == 4 and all(bool(x.isfinite().all()) for x in used), order
        for a, b in zip(got.indices, want.indices, strict=True):
            assert_bits_equal(a, b, f"{kind} {order}")


def test_maxima_go_with_their_statistics(emulated: Any, rng: torch.Generator) -> None:
    squares, _ = accumulators(rng)
    maxima = ChunkMaxima()
    piece_ops.accumulate_squares_(squares, gradients(rng), maxima=maxima)
    assert maxima.of(squares, [], "plain", 0.0)
    squares.clear()
    assert not maxima._entries and maxima._lists is None


def test_what_maxima_need(emulated: Any) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'random'"):
        ChunkMaxima("random")
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"'piece-s' are made of sums and square_sums"):
        piece_ops.accumulate_squares_(x, x, maxima=ChunkMaxima("piece-s"))


def test_on_the_cpu_they_do_nothing() -> None:
    maxima, squares = ChunkMaxima(), torch.zeros(64)
    piece_ops.accumulate_squares_(squares, torch.arange(64.0), maxima=maxima)
    assert not maxima._entries and maxima._lists is None
    assert piece_ops.select_topk(squares, 1, maxima=maxima).indices.tolist() == [63]


# ---- Importance -------------------------------------------------------------------------------


def select(method: str, **options: Any) -> Selection:
    importance = piece_ops.Importance(llama(), method, **options)
    for batch in BATCHES:
        importance.update(batch)
    return importance.select(density=0.02)


@pytest.mark.parametrize("per_sample", ["loop", True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("piece-f", {}),
        ("piece-s", {}),
        ("piece-s", {"xi": 1e-4}),
        ("gradient", {}),
        ("snip", {}),
        ("taylor", {}),
        ("piece-f", {"accumulators": "bfloat16"}),
    ],
)
def test_importance_selects_the_same(
    emulated: EmulatedRuntime,
    selections: Any,
    method: str,
    options: dict[str, Any],
    per_sample: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By maxima wherever every gradient went through accumulate_squares_, that is by the loop."""
    with monkeypatch.context() as without:
        without.setattr(emulated, "takes", lambda tensor: False)
        want = select(method, per_sample=per_sample, **options)
    selections.clear()
    got = select(method, per_sample=per_sample, **options)
    (used,) = selections
    assert bool(used) == (per_sample == "loop" and not options.get("accumulators"))
    assert got.threshold == want.threshold
    assert list(got.indices) == list(want.indices)
    for name, index in want.indices.items():
        assert_bits_equal(got.indices[name], index, name)


@pytest.mark.parametrize("per_sample", ["loop", True])
def test_one_wait_a_backward(
    emulated: Any, per_sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No accumulation reads its own report; all of a backward's are read at its end."""
    waits: list[int] = []
    first_bad = cuda_reports.Reports.first_bad

    def counted(reports: cuda_reports.Reports) -> Any:
        waits.append(len(reports._words))
        return first_bad(reports)

    monkeypatch.setattr(cuda_reports.Reports, "first_bad", counted)
    accumulate, deferred = cuda._accumulate, []

    def watched(*arguments: Any, **options: Any) -> Any:
        deferred.append(options["deferred"])
        return accumulate(*arguments, **options)

    monkeypatch.setattr(cuda, "_accumulate", watched)
    importance = piece_ops.Importance(llama(), "piece-s", per_sample=per_sample)
    importance.update(BATCHES[0])
    backwards = BATCHES[0]["input_ids"].shape[0] if per_sample == "loop" else 1
    assert len(waits) == backwards
    # Where products are multiplied by the CPU's kernel, as here, that looks at them itself.
    assert all(count >= (len(importance.names) if per_sample == "loop" else 1) for count in waits)
    assert deferred and all(deferred)


@pytest.mark.parametrize("per_sample", ["loop", True])
@pytest.mark.parametrize("suffix", ["q_proj.weight", "layernorm.weight"])
def test_a_gradient_that_is_not_finite_is_named(
    emulated: Any, per_sample: Any, suffix: str
) -> None:
    """At the end of the backward, with its sample; the statistics are spoiled then."""
    model = llama()
    name = next(n for n, _ in model.named_parameters() if n.endswith(suffix))
    owner = model.get_submodule(name.rsplit(".", 1)[0])

    def after(module: Any, inputs: Any, output: Tensor) -> Tensor:
        def poison(grad: Tensor) -> Tensor:
            bad = grad.clone()
            bad[-1].view(-1)[0] = float("nan")
            return bad

        output.register_hook(poison)
        return output

    importance = piece_ops.Importance(model, "piece-f", per_sample=per_sample, include=[name])
    importance.update(BATCHES[0])
    handle = owner.register_forward_hook(after)
    try:
        with pytest.raises(ValueError, match=rf"gradient of sample \d+ .*must be finite.*{suffix}"):
            importance.update(BATCHES[0])
    finally:
        handle.remove()
    with pytest.raises(RuntimeError, match="incomplete, call reset"):
        importance.select(k=1)
