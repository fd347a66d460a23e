"""One array of any library as a tensor, without a copy, and the way back for results.

PyTorch is taken as it is, NumPy by its own door, everything else through DLPack or
``__cuda_array_interface__``. No library is imported here: whose array it is says its type, and a
library that made an array has been imported by somebody.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from piece_ops._dlpack import (
    MAX_VERSION,
    describe,
    tensor_from_cuda_array_interface,
    tensor_from_dlpack,
)

# Turns a result into the caller's array type.
GiveBack = Callable[[Tensor], Any]

# Arguments that hold positions: from JAX they may be int32, its only index type without x64.
POSITIONS = ("indices", "exclude")
INT32_MAX = 2**31 - 1

PLAIN = {np.dtype(name) for name in ("float32", "float16", "float64", "int64")}


def take(
    op: str, argument: str, value: Any, *, is_written: bool = False
) -> tuple[Tensor, GiveBack | None]:
    """View one array as a tensor; never copies, but for int32 positions of JAX.

    Returns
    -------
    tensor : Tensor
    give_back : callable, or None
        Turns a tensor that belongs to this array into the caller's array type; None: tensors stay
        tensors.

    Raises
    ------
    TypeError
        If it is no array, of a dtype that torch does not have, traced, masked, or immutable though
        it is to be written.
    ValueError
        If it is read-only though it is to be written, or its layout is wrong.
    NotImplementedError
        If it is on a device that cannot be used here.
    """
    if isinstance(value, Tensor):
        return value, None
    if type(value) is np.ndarray and value.flags.carray and value.dtype in PLAIN:
        try:
            return torch.from_numpy(value), Tensor.numpy  # the usual case, at half the cost
        except ValueError:  # a single element with a negative stride: refused below
            pass
    where = f"piece_ops.{op}: {argument}"
    if isinstance(value, np.ndarray):
        return _take_numpy(where, value, is_written), _giver_of_numpy(value)
    jax = sys.modules.get("jax")
    if isinstance(value, getattr(jax, "Array", ())):
        tensor, give_back = _take_jax(where, jax, value, is_written)
        if tensor.dtype == torch.int32 and argument.partition("[")[0] in POSITIONS:
            tensor = tensor.long()
        return tensor, give_back
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return tensor_from_dlpack(where, value, is_written=is_written), _giver_of_library(value)
    if hasattr(value, "__cuda_array_interface__"):
        tensor = tensor_from_cuda_array_interface(where, value, is_written=is_written)
        return tensor, _giver_of_library(value)
    raise TypeError(
        f"{where} must be an array (PyTorch, NumPy, JAX, CuPy, or with __dlpack__), "
        f"got {describe(value)}"
    )


def as_tensor(op: str, argument: str, value: Any, *, is_written: bool) -> Tensor:
    """Only the tensor of `take`."""
    return take(op, argument, value, is_written=is_written)[0]


# ---- NumPy ---------------------------------------------------------------------------------------


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Is it the bfloat16 of ml_dtypes, which torch does not know? ``kind`` first: it is fast."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def _take_numpy(where: str, value: np.ndarray[Any, Any], is_written: bool) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{where} must have no mask, got a numpy.ma.MaskedArray; fill it first")
    if not value.dtype.isnative:
        raise TypeError(f"{where} must be in this machine's byte order, got dtype {value.dtype!r}")
    is_bfloat16 = _is_bfloat16(value.dtype)
    bits = value.view(np.int16) if is_bfloat16 else value
    if not bits.flags.carray or bits.size == 1:  # one element is contiguous whatever its strides
        _check_layout(where, value, is_written)
    try:
        tensor = torch.from_numpy(bits) if bits.flags.writeable else _view_read_only(bits)
    except (TypeError, ValueError, BufferError) as error:
        raise (ValueError if isinstance(error, ValueError) else TypeError)(
            f"{where} must be an array that PyTorch can take over, got dtype {value.dtype} with "
            f"strides of {value.strides} bytes: {error}"
        ) from error
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def _view_read_only(value: np.ndarray[Any, Any]) -> Tensor:
    """from_numpy warns about read-only arrays; DLPack lets them through, and nothing writes."""
    try:
        capsule = value.__dlpack__(max_version=MAX_VERSION)
    except TypeError:  # NumPy before 2.1
        capsule = value.__dlpack__()
    return from_dlpack(capsule)  # of the array itself it takes 2 us more


def _check_layout(where: str, value: np.ndarray[Any, Any], is_written: bool) -> None:
    if is_written and not value.flags.writeable:
        raise ValueError(f"{where} is written and must be writeable, got a read-only array")
    # Negative strides must not reach torch's readers: some of them end the process.
    if any(stride < 0 for stride in value.strides):
        raise ValueError(
            f"{where} must be contiguous, got shape {value.shape} with strides of "
            f"{value.strides} bytes; call numpy.ascontiguousarray first if a copy is meant"
        )
    if not value.flags.aligned:
        raise ValueError(
            f"{where} must be aligned to {value.dtype.alignment} bytes, got an array that is not"
        )


def _giver_of_numpy(value: np.ndarray[Any, Any]) -> GiveBack:
    return partial(_give_to_numpy, value.dtype) if _is_bfloat16(value.dtype) else Tensor.numpy


def _give_to_numpy(bfloat16: np.dtype[Any], tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


# ---- JAX -----------------------------------------------------------------------------------------


def _take_jax(where: str, jax: Any, value: Any, is_written: bool) -> tuple[Tensor, GiveBack]:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{where} must be an array in memory, got a JAX tracer (of jit, grad or vmap); call it "
            "outside of the traced function, or inside by jax.pure_callback"
        )
    if is_written:
        raise TypeError(
            f"{where} is written and must be mutable, got a jax.Array, which is immutable; pass "
            "numpy.array(x) or a PyTorch tensor and convert it afterwards"
        )
    view = None
    try:
        devices = value.devices()
        if len(devices) == 1:
            (device,) = devices
            if device.platform == "cpu":
                # A view of the same memory, read-only; waits until it is computed.
                view = np.asarray(value)
    except (TypeError, RuntimeError) as error:  # a random key; a deleted array
        raise TypeError(f"{where} must be an array in memory, got {error}") from error
    if len(devices) != 1:
        raise ValueError(f"{where} must be on one device, got a jax.Array over {len(devices)}")
    give_back = partial(_give_to_jax, where, jax, value, None if view is None else devices)
    if view is None:
        return tensor_from_dlpack(where, value, is_written=False), give_back
    if view.dtype in PLAIN and view.flags.c_contiguous:  # what XLA makes is aligned
        return _view_read_only(view), give_back
    return _take_numpy(where, view, False), give_back


def _give_to_jax(where: str, jax: Any, value: Any, cpu: set[Any] | None, tensor: Tensor) -> Any:
    """``cpu``: the devices of value, if that is one CPU."""
    # Without x64 JAX has no int64 and keeps the lower half, an int32; right if nothing is above.
    is_positions = tensor.dtype == torch.int64
    if is_positions and value.size > INT32_MAX + 1 and not jax.config.jax_enable_x64:
        raise ValueError(
            f"{where} must have at most {INT32_MAX + 1} elements (JAX without x64 has int32 "
            f"positions only), got {value.size}; call "
            'jax.config.update("jax_enable_x64", True) first, or pass numpy.asarray(x)'
        )
    if cpu is None:
        result = jax.dlpack.from_dlpack(tensor)
    else:
        array = tensor.numpy() if is_positions else _give_to_numpy(value.dtype, tensor)
        result = _numpy_to_jax(jax, array)
        if result.devices() != cpu:
            result = jax.device_put(result, value.sharding)
    if tensor.is_floating_point() and result.dtype.itemsize != tensor.element_size():
        raise ValueError(
            f"{where} must have results of a dtype that JAX can hold, got {tensor.dtype}; call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    return result


# Results of one shape and dtype so far; from so many on, and up to this size, by a compiled copy.
_given: dict[tuple[tuple[int, ...], Any], int] = {}
OFTEN, SMALL, SHAPES = 256, 10_000, 4096


def _numpy_to_jax(jax: Any, array: np.ndarray[Any, Any]) -> Any:
    """An array of JAX on its default device.

    device_put: 30 us (by DLPack 45). jax.numpy.asarray: 15 us, but 20 ms at every new shape, for
    which it compiles a copy (0.10), and the parts of a selection have a new one each. So only a
    shape that comes again and again gets a compiled copy: 10 us.
    """
    if array.size > SMALL or jax.config.jax_disable_jit:
        return jax.device_put(array)
    key = array.shape, array.dtype
    times = _given.get(key, 0)
    if times >= OFTEN:
        return _compiled_copy(jax)(array)
    if len(_given) >= SHAPES:
        _given.clear()
    _given[key] = times + 1
    return jax.device_put(array)


@lru_cache(maxsize=1)
def _compiled_copy(jax: Any) -> Callable[[Any], Any]:
    def same(x: Any) -> Any:
        return x

    compiled: Callable[[Any], Any] = jax.jit(same)
    return compiled


# ---- any other library ---------------------------------------------------------------------------


def _giver_of_library(value: Any) -> GiveBack | None:
    """``from_dlpack`` of the array's library, if it can be found."""
    if hasattr(value, "__array_namespace__"):
        library = value.__array_namespace__()
    else:
        library = sys.modules.get(type(value).__module__.partition(".")[0])
    return getattr(library, "from_dlpack", None)


# ---- dtypes, and tensors without a kernel --------------------------------------------------------


def torch_dtype(op: str, dtype: Any) -> torch.dtype | None:
    """Torch's dtype of this name; NumPy's and JAX's own are known too."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    try:
        found = getattr(torch, np.dtype(dtype).name, None)
    except TypeError:
        found = None
    if not isinstance(found, torch.dtype):
        raise TypeError(f"piece_ops.{op}: dtype must be a dtype of PyTorch or NumPy, got {dtype!r}")
    return found


def peculiarity(tensor: Tensor) -> str | None:
    """What sets this tensor apart from a dense one in memory; None: nothing."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {describe(tensor)}, for which there is no kernel"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "one that torch.func transforms (vmap, grad); call it outside"
    if tensor.is_nested:
        return "a nested tensor; pass .unbind()"
    if tensor.layout != torch.strided:
        return f"one of layout {str(tensor.layout).removeprefix('torch.')}; call .to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor; call .dequantize()"
    if tensor.is_meta:
        return "a meta tensor, which holds no data"
    if tensor.is_neg() or tensor.is_conj():
        return "a view that negates or conjugates lazily; call .resolve_neg().resolve_conj()"
    return None
