"""Arrays of other libraries: NumPy with ml_dtypes, and whatever speaks DLPack; without a GPU.

JAX has a file of its own, test_interop_jax.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import piece_ops
from piece_ops import _dlpack
from piece_ops._arrays import Arrangement

from helpers.foreign import CUDA, METAL, Exported, ExportedBefore1, Mutable, OfALibrary, OnCuda

Array = np.ndarray[Any, Any]
DTYPES = [np.dtype(t) for t in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)]


def draw(n: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(n).standard_normal(n).astype(dtype)


def bits(array: Array) -> Array:
    return array.view(f"i{array.dtype.itemsize}")


def as_torch(array: Array) -> Tensor:
    """A copy, by another way than the library's."""
    return torch.from_numpy(bits(array).copy()).view(getattr(torch, array.dtype.name))


def read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


def int64(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


# ---- NumPy ---------------------------------------------------------------------------------------

NUMPY: dict[str, Callable[[Array], Array]] = {
    "array": lambda a: a,
    "read-only": read_only,
    "matrix": lambda a: a.view(np.matrix),
    "0-dim and empty": lambda a: a,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NUMPY)
def test_numpy_in_numpy_out(dtype: np.dtype[Any], kind: str) -> None:
    """What is read: the same result as from tensors, in NumPy's own types."""
    shapes = [(), (0,), (1,)] if kind.startswith("0") else [(60,), (2, 4), (1, 1)]
    arrays = [draw(int(np.prod(shape)), dtype).reshape(shape) for shape in shapes]
    given, tensors = [NUMPY[kind](a) for a in arrays], [as_torch(a) for a in arrays]
    k = sum(a.size for a in arrays) // 2
    want, got = piece_ops.select_topk(tensors, k), piece_ops.select_topk(given, k)
    assert (got.threshold, got.ties_kept) == (want.threshold, want.ties_kept)
    values = piece_ops.gather(given, got.indices)
    for t, array in enumerate(arrays):
        index, value = got.indices[t], values[t]
        assert type(index) is np.ndarray and index.dtype == np.int64
        assert index.tolist() == want.indices[t].tolist()
        assert type(value) is np.ndarray and value.dtype == dtype
        assert np.array_equal(bits(value), bits(array.reshape(-1)[index]))
    assert piece_ops.total(given) == piece_ops.total(tensors)


@pytest.mark.parametrize("arrange", [list, tuple, lambda a: dict(zip("xyz", a, strict=True))])
def test_every_arrangement(arrange: Callable[[Any], Any]) -> None:
    arrays = [draw(n) for n in (5, 1, 300)]
    given = arrange(arrays)
    for top in (piece_ops.select_topk(given, 40), piece_ops.select_topk(given, 1, "tensor")):
        assert type(top.indices) is type(given)
        taken = piece_ops.gather(given, top.indices)
        assert type(taken) is type(given)
        for values, array, index in zip(
            *(x.values() if isinstance(x, dict) else x for x in (taken, given, top.indices)),
            strict=True,
        ):
            assert np.array_equal(values, array[index])


def test_each_result_is_of_its_own_entrys_type() -> None:
    """One list may mix libraries; other arguments need not be of the same one."""
    array = draw(50)
    mixed = [array, torch.from_numpy(array.copy()), OfALibrary(array), Exported(array)]
    top = piece_ops.select_topk(mixed, 8)
    assert [type(i) for i in top.indices] == [np.ndarray, Tensor, OfALibrary, Tensor]
    values = piece_ops.gather(mixed, [np.asarray(i) for i in top.indices[:2]] + top.indices[2:])
    assert [type(v) for v in values] == [np.ndarray, Tensor, OfALibrary, Tensor]


def test_ten_thousand_arrays() -> None:
    arrays = [draw(n % 3) for n in range(10_000)]
    top = piece_ops.select_topk(arrays, 500)
    want = piece_ops.select_topk([torch.from_numpy(a) for a in arrays], 500)
    assert [i.tolist() for i in top.indices] == [i.tolist() for i in want.indices]


def test_numpy_is_written_in_place() -> None:
    """The four ops that write, against the same call on tensors; bfloat16 weights too."""
    for dtype in DTYPES[:2] + DTYPES[3:]:
        weight, index = draw(40, dtype), int64(1, 7, 39)
        master = weight[index].astype(np.float32)
        moments = np.zeros(3, np.float32), np.zeros(3, np.float32)
        squares, sums = np.zeros(40, np.float32), np.zeros(40, np.float32)
        arrays = [weight, index, master, draw(40, dtype), *moments, squares, sums]
        tensors = [as_torch(a) for a in arrays]
        addresses = [a.ctypes.data for a in arrays]
        for w, i, v, g, m, s, f, total in (arrays, tensors):  # type: ignore[misc]
            piece_ops.accumulate_squares_(f, g, total, weight=0.5)
            piece_ops.sparse_adamw_(w, i, v, g, m, s, step=1, lr=0.1)
            piece_ops.scatter_(w, i[:1], v[:1])
        for array, tensor, address in zip(arrays, tensors, addresses, strict=True):
            assert array.ctypes.data == address
            assert as_torch(array).view(torch.uint8).equal(tensor.view(torch.uint8))


@pytest.mark.parametrize("as_dict", [False, True])
def test_arrangements_of_numpy_are_written_in_place(as_dict: bool) -> None:
    """Lists and dicts through every op that writes, bit for bit what tensors get."""
    sizes = (40, 1, 7)
    drawn: dict[str, list[Array]] = {
        "weights": [draw(n, ml_dtypes.bfloat16) for n in sizes],
        "indices": [int64(1, 39), int64(0), int64(2, 3, 6)],
        "grads": [draw(n) for n in sizes],
        "squares": [np.zeros(n, np.float32) for n in sizes],
        "sums": [np.zeros(n, np.float32) for n in sizes],
    }
    pairs = list(zip(drawn["weights"], drawn["indices"], strict=True))
    drawn["values"] = [w[i].astype(np.float32) for w, i in pairs]
    for name in ("exp_avgs", "exp_avg_sqs"):
        drawn[name] = [np.zeros_like(v) for v in drawn["values"]]
    tensors = {name: [as_torch(a) for a in arrays] for name, arrays in drawn.items()}

    def arranged(arrays: list[Any]) -> Any:
        return dict(zip("xyz", arrays, strict=True)) if as_dict else arrays

    for given in (drawn, tensors):
        a: dict[str, Any] = {name: arranged(arrays) for name, arrays in given.items()}
        piece_ops.accumulate_squares_(a["squares"], a["grads"], a["sums"])
        piece_ops.sparse_adamw_(
            *(a[n] for n in ("weights", "indices", "values", "grads", "exp_avgs", "exp_avg_sqs")),
            step=1,
            lr=0.1,
        )
        piece_ops.scatter_(a["squares"], a["indices"], a["values"])
    for name, arrays in drawn.items():
        for array, tensor in zip(arrays, tensors[name], strict=True):
            assert as_torch(array).view(torch.uint8).equal(tensor.view(torch.uint8)), name
    assert drawn["exp_avgs"][0].all() and drawn["sums"][0].all()


def test_nothing_is_copied() -> None:
    for array in (draw(9), read_only(draw(9)), draw(9, ml_dtypes.bfloat16)):
        for value in (array, *([Exported(array)] if array.dtype.kind == "f" else [])):
            assert Arrangement("gather", "sources", value).tensors[0].data_ptr() == (
                array.ctypes.data
            )


def test_memmaps(tmp_path: Path) -> None:
    """Written through to the file; a read-only one can be read."""
    array = draw(30)
    array.tofile(tmp_path / "scores")
    for mode in ("r", "r+"):
        mapped = np.memmap(tmp_path / "scores", np.float32, mode)  # type: ignore[call-overload]
        assert piece_ops.select_topk(mapped, 1).indices.tolist() == [int(array.argmax())]
    piece_ops.scatter_(mapped, int64(3), np.array([9.0], np.float32))
    mapped.flush()
    assert np.fromfile(tmp_path / "scores", np.float32)[3] == 9.0


def test_gather_widens_by_any_name_of_float32() -> None:
    source = draw(5, ml_dtypes.bfloat16)
    for dtype in (torch.float32, np.float32, np.dtype("f4"), "float32"):
        values = piece_ops.gather(source, int64(0, 4), dtype=dtype)
        assert values.dtype == np.float32 and values.tolist() == source[[0, 4]].tolist()


# ---- objects that speak a protocol ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [Exported, ExportedBefore1, Mutable, OfALibrary])
def test_an_object_with_dlpack(kind: type[Exported]) -> None:
    """Read without a copy; results come back by its library, or as tensors when it has none."""
    array = draw(20)
    top = piece_ops.select_topk(kind(array), 3)
    assert type(top.indices) is (OfALibrary if kind is OfALibrary else Tensor)
    assert sorted(np.argsort(array)[-3:]) == np.from_dlpack(top.indices).tolist()
    values = piece_ops.gather({"w": kind(array)}, {"w": top.indices})["w"]
    assert np.array_equal(np.from_dlpack(values), array[np.from_dlpack(top.indices)])


@pytest.mark.parametrize("kind", [Exported, Mutable])
def test_an_object_with_dlpack_is_written(kind: type[Exported]) -> None:
    array = np.zeros(4, np.float32)
    piece_ops.scatter_(kind(array), int64(2), np.ones(1, np.float32))
    assert array.tolist() == [0, 0, 1, 0]


def test_empty_and_0_dim_objects() -> None:
    given = [Exported(np.empty((0, 3), np.float32)), Exported(np.array(2, np.float32))]
    assert [i.tolist() for i in piece_ops.select_topk(given, 1).indices] == [[], [0]]
    assert piece_ops.total(given) == 2.0


def test_a_result_lives_longer_than_what_it_came_from() -> None:
    values = piece_ops.gather(OfALibrary(draw(1000)), int64(*range(1000)))
    assert np.array_equal(np.from_dlpack(values), draw(1000))


def two_versions_ahead() -> Exported:
    class Ahead(Exported):
        def __dlpack__(self, **options: Any) -> Any:
            capsule = super().__dlpack__(**options)
            address = _dlpack._pointer(capsule, b"dltensor_versioned")
            _dlpack._Versioned.from_address(address).major = 2
            return capsule

    return Ahead(draw(3))


class NoCapsule(Exported):
    def __dlpack__(self, **options: Any) -> Any:
        return object()


class Unwilling(Exported):
    def __dlpack__(self, **options: Any) -> Any:
        raise RuntimeError("it has been deleted")


def with_interface(**changes: Any) -> OnCuda:
    value = OnCuda()
    value.__cuda_array_interface__.update(changes)
    return value


def unaligned() -> Array:
    return np.frombuffer(b"x" + draw(4).tobytes(), np.float32, offset=1)


# id: (what makes the array, error, words that the message must hold)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "a float": (lambda: 3.0, TypeError, ["array", "float"]),
    "a NumPy scalar": (lambda: np.float32(3), TypeError, ["array", "numpy.float32"]),
    "a list in a list": (lambda: [1.0], TypeError, ["[0]", "float"]),
    "a string": (lambda: "w", TypeError, ["str"]),
    "a capsule": (lambda: draw(3).__dlpack__(), TypeError, ["PyCapsule"]),
    "integers": (lambda: np.arange(4), TypeError, ["float32", "int64"]),
    "complex": (lambda: np.ones(4, np.complex64), TypeError, ["complex64"]),
    "objects": (lambda: np.array([None, 1]), TypeError, ["object"]),
    "dates": (lambda: np.zeros(3, "M8[s]"), TypeError, ["datetime64"]),
    "long doubles": (lambda: np.ones(3, np.longdouble), TypeError, ["float128"]),
    "records": (lambda: np.zeros(3, [("a", "f4")]), TypeError, ["'a'"]),
    "float8": (lambda: draw(4, ml_dtypes.float8_e4m3fn), TypeError, ["float8_e4m3fn"]),
    "big-endian": (lambda: draw(4).astype(">f4"), TypeError, [">f4", "byte order"]),
    "masked": (lambda: np.ma.masked_array(draw(4), [0, 1, 0, 1]), TypeError, ["mask", "fill"]),
    "negative strides": (lambda: draw(4)[::-1], ValueError, ["contiguous", "-4"]),
    "negative strides, read-only": (
        lambda: read_only(draw(4))[::-1],
        ValueError,
        ["contiguous", "-4"],
    ),
    "negative strides, bfloat16": (
        lambda: draw(4, ml_dtypes.bfloat16)[::-1],
        ValueError,
        ["contiguous", "-2"],
    ),
    "one element, negative stride": (
        lambda: np.zeros(1, np.float32)[::-1],
        ValueError,
        ["contiguous", "-4"],
    ),
    "one element, negative stride, bfloat16": (
        lambda: np.zeros(1, ml_dtypes.bfloat16)[::-1],
        ValueError,
        ["contiguous", "-2"],
    ),
    "one element, negative stride, read-only": (
        lambda: read_only(np.zeros(1, np.float32))[::-1],
        ValueError,
        ["contiguous", "-4"],
    ),
    "negative strides by DLPack": (
        lambda: Exported(draw(4)[::-1]),
        ValueError,
        ["contiguous", "-1"],
    ),
    "transposed": (lambda: draw(6).reshape(2, 3).T, ValueError, ["contiguous", "(1, 3)"]),
    "transposed by DLPack": (
        lambda: Exported(draw(6).reshape(2, 3).T),
        ValueError,
        ["contiguous", "(1, 3)"],
    ),
    "broadcast": (lambda: np.broadcast_to(draw(1), 4), ValueError, ["contiguous", "(0,)"]),
    "a column": (lambda: np.zeros((3, 2), np.float32)[:, 0], ValueError, ["contiguous", "(2,)"]),
    "a field of packed records": (lambda: np.zeros(3, "f4,i1")["f0"], ValueError, ["aligned"]),
    "unaligned": (unaligned, ValueError, ["aligned to 4 bytes"]),
    "unaligned by DLPack": (lambda: Exported(unaligned()), ValueError, ["aligned to 4 bytes"]),
    "integers by DLPack": (lambda: Exported(np.arange(4)), TypeError, ["float32", "int64"]),
    "a dtype that DLPack has not": (
        lambda: Exported(np.array(["a"])),
        TypeError,
        ["DLPack", "Exported"],
    ),
    "DLPack 2": (two_versions_ahead, TypeError, ["DLPack", "2.0"]),
    "no capsule": (lambda: NoCapsule(draw(3)), ValueError, ["DLPack", "NoCapsule"]),
    "its own refusal": (lambda: Unwilling(draw(3)), ValueError, ["Unwilling", "been deleted"]),
    "on CUDA": (lambda: Exported(draw(3), (CUDA, 0)), NotImplementedError, ["CUDA", "PyTorch"]),
    "on Metal": (lambda: Exported(draw(3), (METAL, 0)), NotImplementedError, ["8", "CPU"]),
    "on CUDA by its interface": (OnCuda, NotImplementedError, ["CUDA", "PyTorch"]),
}
if torch.cuda.is_available():
    del BAD["on CUDA"], BAD["on CUDA by its interface"]


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    make, error, words = BAD[name]
    for argument, call in (
        ("scores", lambda: piece_ops.select_topk(make(), 1)),
        ("sources['w']", lambda: piece_ops.gather({"w": make()}, {"w": int64(0)})),
        ("targets", lambda: piece_ops.scatter_(make(), int64(0), np.ones(1, np.float32))),
    ):
        with pytest.raises(error) as caught:
            call()
        text = str(caught.value)
        assert text.startswith("piece_ops.") and argument.partition("[")[0] in text, text
        assert "got" in text, text
        if argument == "scores":  # scatter_ may find something else to say first
            for word in words:
                assert word in text, f"{word!r} is not in: {text}"


NOT_WRITABLE: dict[str, tuple[Callable[[Array], Any], type[Exception], str]] = {
    "read-only": (read_only, ValueError, "read-only"),
    "broadcast": (lambda a: np.broadcast_to(a, (1, 4)), ValueError, "read-only"),
    "read-only, bfloat16": (
        lambda a: read_only(a.astype(ml_dtypes.bfloat16)),
        ValueError,
        "read-only",
    ),
    "DLPack's flag": (lambda a: Exported(read_only(a)), ValueError, "read-only"),
    "DLPack's copy": (lambda a: Exported(a, copy=True), ValueError, "copy"),
    "nothing says so": (ExportedBefore1, TypeError, "mutable"),
}


@pytest.mark.parametrize("name", NOT_WRITABLE)
def test_what_must_not_be_written_is_refused(name: str) -> None:
    """Of every argument that is written, by name; and nothing has been written."""
    make, error, word = NOT_WRITABLE[name]
    index, one = int64(2), np.ones(1, np.float32)
    calls: dict[str, Callable[[Any], Any]] = {
        "targets": lambda x: piece_ops.scatter_(x, index, one),
        "square_sums": lambda x: piece_ops.accumulate_squares_(x, draw(4)),
        "sums": lambda x: piece_ops.accumulate_squares_(None, draw(4), x),
        "weights": lambda x: piece_ops.sparse_adamw_(
            x, index, one, one, one.copy(), one.copy(), step=1, lr=0.1
        ),
        "exp_avgs": lambda x: piece_ops.sparse_adamw_(
            draw(4), index, one, one, x, one.copy(), step=1, lr=0.1
        ),
    }
    for argument, call in calls.items():
        array = np.zeros(4, np.float32)
        value = make(array)
        with pytest.raises(error, match=rf"{argument} is written.*{word}"):
            call(value)
        assert not array.any()
        assert one.tolist() == [1.0]


def test_masks_and_read_only_cuda_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at before torch is asked for the memory."""
    monkeypatch.setattr(_dlpack, "require_cuda", lambda where, device_id: None)
    for changes, error, word in (
        ({"mask": OnCuda()}, TypeError, "mask"),
        ({"data": (64, True)}, ValueError, "read-only"),
        ({"strides": (-4,)}, ValueError, "contiguous"),
    ):
        with pytest.raises(error, match=rf"piece_ops\.scatter_: targets .*{word}"):
            piece_ops.scatter_(with_interface(**changes), int64(0), np.ones(1, np.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_the_error_of_a_cuda_array_says_what_is_missing() -> None:
    missing = "without CUDA" if torch.version.cuda is None else "no CUDA device"
    for value in (Exported(draw(3), (CUDA, 1)), OnCuda()):
        with pytest.raises(NotImplementedError, match=f"CUDA device.*{missing}.*move"):
            piece_ops.total([value])


class ByInterface:
    """A CUDA tensor of which only ``__cuda_array_interface__`` is seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def __cuda_array_interface__(self) -> Any:
        return self.tensor.__cuda_array_interface__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_arrays_on_a_gpu() -> None:
    x = torch.rand(10_000, device="cuda")
    want = piece_ops.select_topk(x, 9).indices
    for value in (Exported(x, (CUDA, x.get_device())), ByInterface(x)):
        (tensor,) = Arrangement("gather", "sources", value).tensors
        assert tensor.is_cuda and tensor.data_ptr() == x.data_ptr()
        got = piece_ops.select_topk([value], 9).indices[0]
        assert got.is_cuda and torch.equal(got, want)
