"""torch.ops.piece_ops.*: schema, fake kernels, mutation, version counters, torch.compile, meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import piece_ops

from helpers.cases import BF16, F32
from helpers.compare import assert_all_bits_equal

OPS = torch.ops.piece_ops
MUTATED = {
    "accumulate_squares_": ("square_sums", "sums"),
    "accumulate_per_sample_squares_": ("square_sums", "sums"),
    "select_topk": (),
    "sparse_adamw_": ("weights", "values", "exp_avgs", "exp_avg_sqs"),
    "gather": (),
    "scatter_": ("targets",),
    "total": (),
    "sampled_weight_grad": (),
}


def arguments(op: str) -> tuple[Any, ...]:
    """Fresh arguments of one call, in the order of the schema."""
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 5, generator=g), torch.randn(7, generator=g)
    indices = [torch.tensor([0, 3, 19]), torch.tensor([6])]
    values = [torch.randn(3, generator=g), torch.randn(1, generator=g)]
    zeros = [torch.zeros(3), torch.zeros(1)]
    if op == "accumulate_squares_":
        return [a.abs(), b.abs()], [a.to(BF16), b.clone()], [a.clone(), b.clone()], 0.5
    if op == "accumulate_per_sample_squares_":
        offsets, scales = torch.tensor([0, 1, 4]), torch.tensor([1.0, 0.5])
        return torch.zeros(5, 7), a, a @ torch.ones(5, 7), offsets, torch.zeros(5, 7), scales
    if op == "select_topk":
        return [a, b.to(BF16)], [], [5], [], "plain", 0.0, 0, "raise", "auto"
    if op == "sparse_adamw_":
        moments = [z.clone() for z in zeros], [z.clone() for z in zeros]
        rates = 1, 0.1, 0.9, 0.999, 1e-8, 0.01
        return [a.to(BF16), b], indices, values, [a.clone(), values[1] * 2], *moments, *rates
    if op == "gather":
        return [a, b], indices, None
    if op == "scatter_":
        return [a, b.to(BF16)], indices, values
    if op == "sampled_weight_grad":
        return a, torch.randn(4, 6, generator=g).to(BF16), torch.tensor([0, 3, 29])
    return ([a, b],)


def overload(op: str) -> Any:
    return getattr(OPS, op).default


def named(op: str, given: tuple[Any, ...]) -> dict[str, Any]:
    names = [argument.name for argument in overload(op)._schema.arguments]
    return dict(zip(names, given, strict=False))


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors of one argument: one, a list of them, or none."""
    parts = x if isinstance(x, (list, tuple)) else [x]
    return [t for t in parts if isinstance(t, Tensor)]


def each(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """An argument with its tensors changed; others as they are."""
    if not tensors_of(x):
        return x
    return change(x) if isinstance(x, Tensor) else [change(t) for t in x]


def moved(device: str, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with their tensors on another device."""
    return tuple(each(lambda t: t.to(device), x) for x in given)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (list, tuple)) else (result,)


@pytest.mark.parametrize("op", MUTATED)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(overload(op), arguments(op))


@pytest.mark.parametrize(
    ("k", "options"),
    [
        ([3, 2], {}),  # one k per tensor
        ([0], {}),
        ([4], {"exclude": [torch.tensor([0, 1]), torch.empty(0, dtype=torch.int64)]}),
        ([4], {"score": "piece-s", "second": [torch.ones(4, 5), torch.ones(7)], "constant": 0.5}),
        ([4], {"score": "random", "seed": 3}),
    ],
    ids=["per_tensor", "k_0", "exclude", "piece_s", "random"],
)
def test_opcheck_of_every_form_of_select_topk(k: list[int], options: dict[str, Any]) -> None:
    given = {**named("select_topk", arguments("select_topk")), "k": k, **options}
    torch.library.opcheck(overload("select_topk"), tuple(given.values()))


@pytest.mark.parametrize("left_out", [("square_sums",), ("sums",), ("sums", "scales")])
def test_opcheck_without_optional_tensors(left_out: tuple[str, ...]) -> None:
    op = "accumulate_per_sample_squares_"
    given = {**named(op, arguments(op)), **dict.fromkeys(left_out)}
    torch.library.opcheck(overload(op), tuple(given.values()))


@pytest.mark.parametrize("op", ["sparse_adamw_", "gather", "scatter_"])
def test_opcheck_of_weights_that_require_grad(op: str) -> None:
    """The dense weights of a model are leaves; writing into them must not need no_grad."""
    given = list(arguments(op))
    given[0] = [t.requires_grad_() for t in given[0]]
    if op == "gather":
        assert not any(t.requires_grad for t in overload(op)(*given))
    else:
        before = [t.detach().clone() for t in given[0]]
        overload(op)(*given)
        assert not torch.equal(given[0][0].detach(), before[0])
        assert given[0][0].is_leaf and given[0][0].requires_grad


@pytest.mark.parametrize("op", MUTATED)
def test_the_schema_declares_what_is_written(op: str) -> None:
    schema = overload(op)._schema
    written = tuple(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    assert written == MUTATED[op]


@pytest.mark.parametrize("op", MUTATED)
def test_version_counters_of_what_is_written(op: str) -> None:
    """Written tensors are bumped (autograd can notice), the others are not. opcheck misses this."""
    given = named(op, arguments(op))
    tensors = {name: tensors_of(value) for name, value in given.items()}
    before = {name: [t._version for t in value] for name, value in tensors.items()}
    overload(op)(*given.values())
    for name, value in tensors.items():
        for t, old in zip(value, before[name], strict=True):
            assert (t._version > old) == (name in MUTATED[op]), f"{name}: {old} -> {t._version}"


def test_backward_notices_a_weight_written_in_between() -> None:
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    OPS.scatter_([w], [torch.tensor([1])], [torch.tensor([5.0])])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_failed_call_bumps_nothing() -> None:
    squares, bad = torch.zeros(3), torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="finite"):
        OPS.accumulate_squares_([squares], [bad], [], 1.0)
    assert squares._version == 0


@pytest.mark.parametrize("op", MUTATED)
def test_fake_tensors_have_the_shapes_and_dtypes_of_the_real_ones(op: str) -> None:
    real = overload(op)(*arguments(op))
    fake = overload(op)(*moved("meta", arguments(op)))
    if real is None:
        assert fake is None
        return
    for r, f in zip(as_tuple(real), as_tuple(fake), strict=True):
        assert f.is_meta and (r.shape, r.dtype) == (f.shape, f.dtype)


@pytest.mark.parametrize("op", MUTATED)
def test_fake_kernels_check_like_the_real_ones(op: str) -> None:
    """A wrong dtype is refused while tracing, with the message of the real call."""
    for device in ("cpu", "meta"):
        given = list(moved(device, arguments(op)))
        given[0] = each(Tensor.int, given[0])
        with pytest.raises(TypeError, match=rf"piece_ops\.{op}: .*int32"):
            overload(op)(*given)


@pytest.mark.parametrize("op", MUTATED)
def test_compiles_without_a_graph_break(op: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*given: Any) -> Any:
        return overload(op)(*given)

    eager, traced = arguments(op), arguments(op)
    want, got = overload(op)(*eager), compiled(*traced)
    if want is not None:
        assert_all_bits_equal(as_tuple(got), as_tuple(want), op)
    for a, b in zip(traced, eager, strict=True):
        assert_all_bits_equal(tensors_of(a), tensors_of(b), f"{op}: arguments")


def test_compiles_with_the_default_backend_inside_other_code() -> None:
    """A whole step: accumulate, select, gather, update; between ordinary torch operations."""
    torch._dynamo.reset()

    def step(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        squares, sums = torch.zeros_like(grad), torch.zeros_like(grad)
        OPS.accumulate_squares_([squares], [grad * 2], [sums], 1.0)
        indices, _, thresholds, _ = OPS.select_topk(
            [sums], [squares], [4], [], "piece-s", 0.5, 0, "raise", "auto"
        )
        values = OPS.gather([weight], [indices], F32)[0] + 1
        OPS.scatter_([weight], [indices], [values])
        return indices, thresholds + 0 * OPS.total([weight])

    g = torch.Generator().manual_seed(6)
    grad, weight = torch.randn(50, generator=g), torch.randn(50, generator=g).to(BF16)
    eager_weight = weight.clone()
    want = step(grad, eager_weight)
    got = torch.compile(step, fullgraph=True)(grad, weight)
    assert_all_bits_equal(got, want, "results")
    assert_all_bits_equal(weight, eager_weight, "weight")


def test_documented_functions_compile() -> None:
    """The Python functions on top, too: lists and dicts of tensors, no graph break."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(squares: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        piece_ops.accumulate_squares_(squares, grads)
        return piece_ops.functional.gather(squares, {key: INDEX for key in squares})

    grads = {"a": torch.arange(4.0), "b": torch.ones(3)}
    squares = {key: torch.zeros_like(g) for key, g in grads.items()}
    got = step(squares, grads)
    assert got["a"].tolist() == [1.0, 4.0] and got["b"].tolist() == [1.0, 1.0]


INDEX = torch.tensor([1, 2])


def test_inference_mode_and_no_grad() -> None:
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            squares = torch.zeros(3)
            OPS.accumulate_squares_([squares], [torch.ones(3)], [], 1.0)
            assert squares.tolist() == [1.0, 1.0, 1.0]
            assert OPS.select_topk(*arguments("select_topk"))[0].numel() == 5
