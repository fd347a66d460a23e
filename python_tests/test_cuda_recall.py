"""Lists that come again on a GPU are recognised, and nothing else is: on emulated kernels."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import piece_ops
from piece_ops import functional
from piece_ops.backends import _cuda_runtime

from helpers.compare import assert_all_bits_equal
from helpers.emulated import EmulatedRuntime, build, emulation, load, route_cpu_tensors

pytestmark = [
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
    ),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]
needs_exchange = pytest.mark.skipif(
    _cuda_runtime._EXCHANGE is None, reason="this torch does not tell C code what a tensor is"
)


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return load(build("plain"))


@pytest.fixture
def emulated(extension: ModuleType) -> Iterator[EmulatedRuntime]:
    """Inside, piece_ops.<op> runs emulated kernels."""
    extension.set_device(2, 2)
    with emulation(extension) as runtime:
        library = route_cpu_tensors()
        yield runtime
    library._destroy()


class NoDispatcher:
    """In the place of torch.ops.piece_ops: whoever asks it fails."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} went through the dispatcher")


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which the dispatcher cannot be reached."""

    class Closed:
        def __enter__(self) -> None:
            monkeypatch.setattr(functional, "_ops", NoDispatcher())

        def __exit__(self, *_: object) -> None:
            monkeypatch.undo()

    return Closed()


def lists(rng: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    sizes = (70_000, 0, 33, 4097)
    return [torch.zeros(n) for n in sizes], [torch.randn(n, generator=rng) for n in sizes]


@needs_exchange
def test_known_tensors_go_straight_there(emulated: Any, closed: Any, rng: torch.Generator) -> None:
    squares, grads = lists(rng)
    piece_ops.accumulate_squares_(squares, grads)
    want = piece_ops.select_topk(grads, 50)
    versions = [x._version for x in squares]
    with closed:
        piece_ops.accumulate_squares_(squares, grads)
        got = piece_ops.select_topk(grads, 50)
        other = piece_ops.select_topk(grads, 3)  # another k over the same table
        with pytest.raises(ValueError, match=r"k must be in 0\.\.74130 .*got 74131"):
            piece_ops.select_topk(grads, 74_131)
        fresh = [x.clone() for x in grads]
        for call in (
            lambda: piece_ops.select_topk(fresh, 50),
            lambda: piece_ops.accumulate_squares_(squares, fresh),
        ):
            with pytest.raises(AssertionError, match="went through the dispatcher"):
                call()
    assert [x._version for x in squares] == [v + 1 for v in versions]
    assert_all_bits_equal(squares, [g * g + g * g for g in grads])
    assert_all_bits_equal(got.indices, want.indices)
    assert (got.threshold, got.ties_kept) == (want.threshold, want.ties_kept)
    assert sum(x.numel() for x in other.indices) == 3
    assert len(_cuda_runtime._tables._tables) == 2


@needs_exchange
def test_a_known_call_that_fails_adds_and_counts_nothing(
    emulated: Any, closed: Any, rng: torch.Generator
) -> None:
    squares, grads = lists(rng)
    piece_ops.accumulate_squares_(squares, grads)
    piece_ops.select_topk(grads, 5)
    grads[2][7] = float("nan")
    before, versions = [x.clone() for x in squares], [x._version for x in squares]
    with closed:
        with pytest.raises(ValueError, match=r"grads\[2\] must be finite, got 1 NaN"):
            piece_ops.accumulate_squares_(squares, grads)
        with pytest.raises(ValueError, match=r"scores\[2\] must not be NaN, got 1 NaN of 33"):
            piece_ops.select_topk(grads, 5)
        with pytest.raises(ValueError, match="weight must be positive and finite, got -1"):
            piece_ops.accumulate_squares_(squares, grads, weight=-1)
    assert_all_bits_equal(squares, before)
    assert [x._version for x in squares] == versions


def changed(x: Tensor, how: str) -> Any:
    """The same object at the same address, otherwise another tensor; what must be said then."""
    if how == "transposed":
        x.t_()
        return ValueError, "must be contiguous"
    if how == "other dtype":
        x.data = x.data.view(torch.int32)
        return TypeError, "must be float32, bfloat16, float16"
    x.data = x.data.view(-1)[:-1]
    return ValueError, "must have 199 elements"


@pytest.mark.parametrize("how", ["transposed", "other dtype", "shorter"])
def test_a_changed_tensor_is_checked_again(emulated: Any, how: str, rng: torch.Generator) -> None:
    squares, grads = [torch.zeros(200)], [torch.randn(10, 20, generator=rng)]
    piece_ops.accumulate_squares_(squares, grads)
    address = grads[0].data_ptr()
    error, text = changed(grads[0], how)
    assert grads[0].data_ptr() == address
    with pytest.raises(error, match=text):
        piece_ops.accumulate_squares_(squares, grads)


def test_excluded_positions_must_stay_flat(emulated: Any, rng: torch.Generator) -> None:
    scores, exclude = [torch.randn(100, generator=rng)], [torch.arange(0, 100, 7)]
    piece_ops.select_topk(scores, 5, exclude=exclude)
    exclude[0].unsqueeze_(1)
    with pytest.raises(ValueError, match=r"exclude\[0\] must be flat \(1-D\), got shape \(15, 1\)"):
        piece_ops.select_topk(scores, 5, exclude=exclude)
    exclude[0].squeeze_(1)[3] = 0
    with pytest.raises(
        ValueError, match=r"exclude\[0\] must be strictly increasing, got 0 after 14"
    ):
        piece_ops.select_topk(scores, 5, exclude=exclude)


def test_a_lazily_negated_view_of_a_known_tensor(emulated: Any, rng: torch.Generator) -> None:
    """It has the same address, size and dtype; only the dispatcher knows what it is."""
    x = torch.randn(70_000, generator=rng)
    for _ in range(2):
        piece_ops.select_topk(x, 9)
    for _ in range(2):
        got = piece_ops.select_topk(torch._neg_view(x), 9)
        assert got.indices.tolist() == piece_ops.select_topk(x.neg(), 9).indices.tolist()


def test_modes_see_every_call(emulated: Any, rng: torch.Generator) -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    squares, grads = lists(rng)
    for _ in range(2):
        piece_ops.accumulate_squares_(squares, grads)
        piece_ops.select_topk(grads, 5)
    with Mode():
        piece_ops.accumulate_squares_(squares, grads)
        piece_ops.select_topk(grads, 5)
    names = [name for name in seen if name.startswith("piece_ops")]
    assert names == ["piece_ops.accumulate_squares_.default", "piece_ops.select_topk.default"]


def test_without_the_exchange_everything_is_checked(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    squares, grads = lists(rng)
    want = [piece_ops.select_topk(grads, 50) for _ in range(2)]
    monkeypatch.setattr(_cuda_runtime, "_EXCHANGE", None)
    got = [piece_ops.select_topk(grads, 50) for _ in range(2)]
    for a, b in zip(got, want, strict=True):
        assert_all_bits_equal(a.indices, b.indices)
    for _ in range(2):
        piece_ops.accumulate_squares_(squares, grads)
    assert_all_bits_equal(squares, [g * g + g * g for g in grads])


@needs_exchange
def test_tensors_are_not_kept_alive(emulated: Any, rng: torch.Generator) -> None:
    import weakref

    squares, grads = lists(rng)
    piece_ops.accumulate_squares_(squares, grads)
    piece_ops.select_topk(grads, 5)
    references = [weakref.ref(x) for x in (*squares, *grads)]
    del squares, grads
    assert not any(reference() is not None for reference in references)


def test_a_tensor_at_a_dead_ones_id_goes_its_own_way(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are used again, by tensors of another device as well."""
    scores, square = torch.rand(1000, generator=rng), torch.zeros(1000)
    monkeypatch.setattr(_cuda_runtime, "_first_ids", {id(scores), id(square)})
    found = piece_ops.select_topk(scores, 10)
    assert int(found.indices.numel()) == 10
    piece_ops.accumulate_squares_(square, scores)
    assert_all_bits_equal([square], [scores * scores])
