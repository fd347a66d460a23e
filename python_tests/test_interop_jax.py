"""JAX arrays, on the CPU: read without a copy, given back as JAX arrays, never written.

The only file that imports jax; so the blocks of docs/interop.md run here, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import piece_ops
from piece_ops import _foreign
from piece_ops._arrays import Arrangement

from helpers.doc_blocks import run_blocks

jax.config.update("jax_num_cpu_devices", 2)  # for arrays that lie elsewhere, or on both

DTYPES = ["float32", "bfloat16", "float16"]
ONE = np.ones(1, np.float32)


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", False)


def draw(n: int, dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(n).standard_normal(n), dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_jax_in_jax_out(dtype: str, x64: bool) -> None:
    """Lists with empty and 0-dim arrays; positions int64, or int32 where JAX has no int64."""
    if dtype == "float64" and not x64:
        pytest.skip("JAX without x64 has no float64")
    scores = [draw(60, dtype), draw(6, dtype).reshape(2, 3), draw(0, dtype), draw(1, dtype)[0]]
    copies = [np.array(x) for x in scores]
    want = piece_ops.select_topk(copies, 20)
    top = piece_ops.select_topk(scores, 20)
    assert (top.threshold, top.ties_kept) == (want.threshold, want.ties_kept)
    values = piece_ops.gather(scores, top.indices)
    for x, copy, index, value, right in zip(
        scores, copies, top.indices, values, want.indices, strict=True
    ):
        assert isinstance(index, jax.Array) and isinstance(value, jax.Array)
        assert (index.dtype, value.dtype) == ("int64" if x64 else "int32", dtype)
        assert index.devices() == value.devices() == x.devices()
        assert index.tolist() == right.tolist()
        assert np.asarray(value).tobytes() == copy.reshape(-1)[right].tobytes()
    assert piece_ops.total(scores) == piece_ops.total(copies)
    for x, copy in zip(scores, copies, strict=True):
        assert np.asarray(x).tobytes() == copy.tobytes()


def test_arrangements_and_results_in_jax_code() -> None:
    weights = {"a": draw(50), "b": draw(7)}
    top = piece_ops.select_topk(weights, 5)
    assert list(top.indices) == ["a", "b"]
    kept = jax.tree.map(lambda w, i: jnp.zeros_like(w).at[i].set(w[i]), weights, top.indices)
    assert sum(int((w != 0).sum()) for w in kept.values()) == 5
    by_itself = piece_ops.select_topk((weights["a"],), 2, "tensor")
    assert isinstance(by_itself.indices, tuple) and by_itself.ties_kept == (1,)
    excluded = piece_ops.select_topk(weights, 5, exclude=top.indices)
    assert not set(excluded.indices["a"].tolist()) & set(top.indices["a"].tolist())


def test_nothing_is_copied_in() -> None:
    for dtype in DTYPES:
        x = draw(64, dtype)
        (tensor,) = Arrangement("gather", "sources", x).tensors
        assert tensor.data_ptr() == x.unsafe_buffer_pointer()


def test_a_computation_that_still_runs_is_waited_for() -> None:
    loop = jax.jit(lambda a: jax.lax.fori_loop(0, 20, lambda i, b: jnp.sin(b @ b), a))
    x = loop(jnp.full((300, 300), 0.01))
    assert piece_ops.total(x) == piece_ops.total(np.array(x))


def test_gradients_of_jax_are_accumulated_into_numpy() -> None:
    grads = jax.grad(lambda w: (w**3).sum())(draw(9))
    squares = np.zeros(9, np.float32)
    piece_ops.accumulate_squares_(squares, grads)
    assert np.array_equal(squares, np.asarray(grads) * np.asarray(grads))


def test_an_op_of_single_arrays() -> None:
    """accumulate_per_sample_squares_, with strided NumPy tokens beside JAX's."""
    tokens, strided = draw(24).reshape(2, 3, 4), np.array(draw(60)).reshape(2, 3, 10)[:, :, :5]
    squares = np.zeros((4, 5), np.float32)
    piece_ops.accumulate_per_sample_squares_(squares, tokens, strided)
    want = np.zeros_like(squares)
    piece_ops.accumulate_per_sample_squares_(want, np.array(tokens), strided.copy())
    assert squares.any() and np.array_equal(squares, want)
    with pytest.raises(TypeError, match=r"square_sums is written .* jax\.Array"):
        piece_ops.accumulate_per_sample_squares_(jnp.zeros((4, 5)), tokens, strided)


def test_results_stay_on_the_device() -> None:
    """The second virtual CPU; DLPack knows only one."""
    x = jax.device_put(draw(9), jax.devices()[1])
    top = piece_ops.select_topk([x, draw(9)], 2)
    assert top.indices[0].devices() == x.devices() != top.indices[1].devices()


def test_a_shape_that_comes_again_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """New shapes never are: that takes 20 ms, and parts of a selection have new ones each time."""
    compiled = _foreign._compiled_copy
    taken: list[int] = []

    def counted(module: Any) -> Any:
        taken.append(1)
        return compiled(module)

    monkeypatch.setattr(_foreign, "_compiled_copy", counted)
    monkeypatch.setattr(_foreign, "_given", {})
    monkeypatch.setattr(_foreign, "OFTEN", 3)
    monkeypatch.setattr(_foreign, "SHAPES", 40)
    x = draw(50)
    want = np.argsort(-np.asarray(x), kind="stable")
    for k in range(1, 51):  # more shapes than are remembered
        assert piece_ops.select_topk(x, k).indices.tolist() == sorted(want[:k])
    assert not taken and len(_foreign._given) == 10
    for number in range(6):
        index = piece_ops.select_topk(x, 5).indices
        assert isinstance(index, jax.Array) and index.devices() == x.devices()
        assert index.dtype == "int32" and index.tolist() == sorted(want[:5])
        assert len(taken) == max(0, number - 2)
    with jax.disable_jit():  # would give back the NumPy array
        assert isinstance(piece_ops.select_topk(x, 5).indices, jax.Array)
    assert len(taken) == 3


@pytest.mark.parametrize("argument", ["targets", "square_sums", "weights", "values"])
def test_written_arrays_are_refused_and_unchanged(argument: str) -> None:
    """DLPack would hand them over as writable."""
    x, index = jnp.zeros(4) if argument != "values" else jnp.zeros(1), np.array([2])
    with pytest.raises(TypeError, match=rf"{argument} is written .* jax\.Array, .*immutable"):
        if argument == "targets":
            piece_ops.scatter_(x, index, ONE)
        elif argument == "square_sums":
            piece_ops.accumulate_squares_(x, np.ones(4, np.float32))
        else:
            weights = x if argument == "weights" else np.ones(4, np.float32)
            values = x if argument == "values" else ONE.copy()
            moments = ONE.copy(), ONE.copy()
            piece_ops.sparse_adamw_(weights, index, values, ONE, *moments, step=1, lr=0.1)
    assert not x.any()


def test_traced_arrays_are_refused() -> None:
    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(TypeError, match=r"total: tensors must be .*tracer.*pure_callback"):
            transform(lambda x: piece_ops.total(x))(jnp.ones((2, 2))[0])


def test_inside_jit_by_a_callback() -> None:
    """What the error recommends."""

    @jax.jit
    def largest(x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct((3,), jnp.int32)
        return jax.pure_callback(lambda v: piece_ops.select_topk(v, 3).indices, shape, x)

    x = draw(40)
    assert largest(x).tolist() == sorted(np.argsort(np.asarray(x))[-3:])


def deleted() -> jax.Array:
    x = draw(3)
    x.delete()
    return x


def sharded() -> jax.Array:
    mesh = jax.sharding.Mesh(jax.devices(), ("d",))
    return jax.device_put(
        draw(4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    )


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jnp.arange(4), TypeError, "float32.*int32"),
        (lambda: jnp.ones(4, "complex64"), TypeError, "complex64"),
        (lambda: jnp.ones(4, "float8_e4m3fn"), TypeError, "float8_e4m3fn"),
        (lambda: jnp.ones(4, "int4"), TypeError, "int4"),
        (lambda: jax.random.key(0), TypeError, "PRNGKey"),
        (deleted, TypeError, "deleted"),
        (sharded, ValueError, "one device.*over 2"),
    ],
)
def test_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^piece_ops\.select_topk: scores must be .*{words}"):
        piece_ops.select_topk(make(), 1)


def test_positions_that_int32_cannot_hold_are_refused() -> None:
    """JAX without x64 would drop their upper half; only the size of the array is looked at."""
    huge = SimpleNamespace(size=2**31 + 1)
    with pytest.raises(ValueError, match=r"at most 2147483648 elements.*got 2147483649.*x64"):
        _foreign._give_to_jax("piece_ops.select_topk: scores", jax, huge, None, torch.tensor([1]))


def test_results_that_jax_would_narrow_are_refused() -> None:
    """A float64 array made with x64, used without."""
    jax.config.update("jax_enable_x64", True)
    x = draw(4, "float64")
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ValueError, match=r"torch\.float64.*x64"):
        piece_ops.gather(x, np.array([1]))


@pytest.mark.parametrize("as_dict", [False, True])
def test_what_is_only_read_by_ops_that_write_may_be_jax(as_dict: bool) -> None:
    """Lists and dicts of NumPy that change, JAX's beside them; JAX in their place is refused."""

    def arranged(arrays: list[Any]) -> Any:
        return dict(zip("xy", arrays, strict=True)) if as_dict else arrays

    sizes, kept = (30, 1), [np.array([3, 29]), np.array([0])]
    results = []
    for read in (jnp.asarray, lambda array: array):
        weights = [np.array(draw(n)) for n in sizes]
        values = [w[i] for w, i in zip(weights, kept, strict=True)]
        states = [[np.zeros_like(v) for v in values] for _ in range(2)]
        grads = arranged([read(np.array(draw(n))) for n in sizes])
        squares = [np.zeros(n, np.float32) for n in sizes]
        indices = arranged([read(i) for i in kept])
        piece_ops.accumulate_squares_(arranged(squares), grads)
        rest = [indices, *map(arranged, (values,)), grads, *map(arranged, states)]
        piece_ops.sparse_adamw_(arranged(weights), *rest, step=1, lr=0.1)
        piece_ops.scatter_(arranged(squares), indices, arranged([jnp.asarray(v) for v in values]))
        results.append([*weights, *values, *states[0], *squares])
    for of_jax, of_numpy in zip(*results, strict=True):
        assert of_jax.any() and np.array_equal(of_jax, of_numpy)
    name = r"weights\['y'\]" if as_dict else r"weights\[1\]"
    with pytest.raises(TypeError, match=name + ".*immutable"):
        piece_ops.sparse_adamw_(arranged([weights[0], jnp.ones(1)]), *rest, step=2, lr=0.1)


DOCS = Path(__file__).parents[1] / "docs/interop.md"


def test_docs_interop() -> None:
    names = run_blocks(DOCS.read_text(encoding="utf-8"))
    assert isinstance(names["top"], piece_ops.TopK)


def test_docs_interop_has_marked_blocks() -> None:
    """Those for a GPU are in the text, and left out without one."""
    assert re.search(r"<!-- needs: cupy -->\n```python", DOCS.read_text(encoding="utf-8"))
