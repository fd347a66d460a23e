"""Arrays of other libraries as tensors, by the protocols that array libraries share; no copy.

torch's own reader of DLPack capsules ends the process on a negative stride and drops the flags
"read-only" and "copied". So the capsule is opened here first; one that passes goes to torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

# dlpack.h of DLPack 1.0: device types, flags, and the two structs a capsule can hold.
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
READ_ONLY, IS_COPIED = 1, 2
MAX_VERSION = (1, 0)


class _Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("array", _Array),
    )


# Prototypes of our own: the attributes of ctypes.pythonapi belong to everybody.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def tensor_from_dlpack(where: str, value: Any, *, is_written: bool) -> Tensor:
    """View an object that has ``__dlpack__`` and ``__dlpack_device__`` as a tensor.

    Parameters
    ----------
    where : str
        Begin of an error's text, such as ``piece_ops.gather: sources[3]``.
    value : object
        On the CPU, or on a CUDA device that torch can use.
    is_written : bool
        Refuse what must not be written, or would not receive what is written.

    Raises
    ------
    TypeError
        A dtype that DLPack or torch does not have, or an immutable array.
    ValueError
        Read-only, a copy, negative strides, not aligned, or what the producer itself refuses.
    NotImplementedError
        The array is on a device that cannot be used here.
    """
    try:
        device_type, device_id = value.__dlpack_device__()
        options = _stream(where, int(device_type), int(device_id))
        try:
            capsule = value.__dlpack__(max_version=MAX_VERSION, **options)
        except (TypeError, NotImplementedError):  # older than DLPack 1.0
            capsule = value.__dlpack__(**options)
        _check(where, capsule, value, is_written)
        return from_dlpack(capsule)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        if str(error).startswith("piece_ops."):
            raise
        kind = TypeError if isinstance(error, (TypeError, BufferError)) else ValueError
        raise kind(
            f"{where} must be an array that DLPack can hand over, got {describe(value)}: {error}"
        ) from error


def _stream(where: str, device_type: int, device_id: int) -> dict[str, int]:
    """What the producer must know of our stream: its work so far comes first."""
    if device_type in (CPU, CUDA_HOST):
        return {}
    if device_type not in (CUDA, CUDA_MANAGED):
        raise NotImplementedError(
            f"{where} must be on a CPU or a CUDA device, got device type {device_type} of DLPack"
        )
    require_cuda(where, device_id)
    # The legacy default stream, 0 in torch, is 1 in the protocol.
    return {"stream": torch.cuda.current_stream(device_id).cuda_stream or 1}


def require_cuda(where: str, device_id: int) -> None:
    """Raise, saying what is missing, unless torch can use this CUDA device."""
    if torch.version.cuda is None:
        missing = f"this PyTorch ({torch.__version__}) is a build without CUDA"
    elif not torch.cuda.is_available():
        missing = f"PyTorch {torch.__version__} finds no CUDA device and driver here"
    elif device_id >= torch.cuda.device_count():
        missing = f"PyTorch sees CUDA devices 0..{torch.cuda.device_count() - 1} only"
    else:
        return
    raise NotImplementedError(
        f"{where} must be on a device that PyTorch can use, got CUDA device {device_id}, but "
        f"{missing}; move the array to the CPU, or use a PyTorch that has the device"
    )


def _check(where: str, capsule: Any, value: object, is_written: bool) -> None:
    """Refuse what torch's reader would take wrongly, or die of."""
    is_versioned = bool(_is_valid(capsule, b"dltensor_versioned"))
    if is_versioned:
        managed = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if managed.major != MAX_VERSION[0]:
            raise BufferError(f"its DLPack version is {managed.major}.{managed.minor}")
        array, flags = managed.array, managed.flags
    else:
        array, flags = _Array.from_address(_pointer(capsule, b"dltensor")), 0
    if is_written:
        _check_writable(where, value, is_versioned, flags)
    if array.strides and array.ndim and min(array.strides[: array.ndim]) < 0:
        raise ValueError(
            f"{where} must be contiguous, got shape {tuple(array.shape[: array.ndim])} with "
            f"strides {tuple(array.strides[: array.ndim])}; make a contiguous copy if one is meant"
        )
    n_bytes = array.bits * array.lanes // 8
    if n_bytes and ((array.data or 0) + array.byte_offset) % n_bytes:
        raise ValueError(f"{where} must be aligned to {n_bytes} bytes, got an array that is not")


def _check_writable(where: str, value: object, is_versioned: bool, flags: int) -> None:
    if flags & READ_ONLY:
        raise ValueError(f"{where} is written and must be writeable, got a read-only array")
    if flags & IS_COPIED:
        raise ValueError(
            f"{where} is written in place, got {describe(value)}, which hands over a copy"
        )
    # Before version 1.0 a producer could not say so; an array that can be written has item
    # assignment (TensorFlow's and Arrow's have not).
    if not is_versioned and not hasattr(value, "__setitem__"):
        raise TypeError(
            f"{where} is written and must be mutable, got {describe(value)}, which neither has "
            "item assignment nor says by DLPack 1.0 that it may be written"
        )


def tensor_from_cuda_array_interface(where: str, value: Any, *, is_written: bool) -> Tensor:
    """View an object that has ``__cuda_array_interface__`` only as a tensor.

    Raises
    ------
    TypeError
        A dtype that torch does not have, or a mask.
    ValueError
        Read-only, or negative strides.
    NotImplementedError
        There is no CUDA device that torch can use.
    """
    interface = value.__cuda_array_interface__
    require_cuda(where, 0)
    if interface.get("mask") is not None:
        raise TypeError(f"{where} must have no mask, got {describe(value)} with one")
    if is_written and interface["data"][1]:
        raise ValueError(f"{where} is written and must be writeable, got a read-only array")
    if any(stride < 0 for stride in interface.get("strides") or ()):
        raise ValueError(
            f"{where} must be contiguous, got shape {interface['shape']} with strides of "
            f"{interface['strides']} bytes; make a contiguous copy if one is meant"
        )
    try:
        tensor = torch.as_tensor(value, device="cuda")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{where} must be an array that PyTorch can take over, got {describe(value)}: {error}"
        ) from error
    if tensor.numel() and tensor.data_ptr() != interface["data"][0]:  # torch made a copy
        raise ValueError(
            f"{where} must be on the current CUDA device ({tensor.device}), got {describe(value)} "
            "on another one; call within torch.cuda.device(...)"
        )
    if interface.get("stream") is not None:  # torch does not look at it
        _wait_for(interface["stream"], tensor.device)
    return tensor


def _wait_for(stream: int, device: torch.device) -> None:
    """Let the current stream wait for what the array interface names: 1 and 2 are no handles."""
    if stream == 2:  # the per-thread default stream, of which torch makes no object
        torch.cuda.synchronize(device)
        return
    external: Any = torch.cuda.ExternalStream
    other = torch.cuda.default_stream(device) if stream == 1 else external(stream, device)
    torch.cuda.current_stream(device).wait_stream(other)


def describe(value: object) -> str:
    """A type's name with its library, as errors show it: ``jaxlib.ArrayImpl``."""
    cls = type(value)
    root = cls.__module__.partition(".")[0]
    return cls.__name__ if root == "builtins" else f"{root}.{cls.__name__}"
