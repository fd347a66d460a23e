"""Arrays of libraries that are not installed: what the protocols see of them, over NumPy memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

CPU, CUDA, METAL = 1, 2, 8


class Exported:
    """Has ``__dlpack__`` and ``__dlpack_device__`` and nothing else, like a compiled library's."""

    def __init__(
        self, array: np.ndarray[Any, Any], device: tuple[int, int] = (CPU, 0), **options: Any
    ) -> None:
        self.array = array
        self.device = device
        self.options = options

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        return self.array.__dlpack__(stream=stream, max_version=max_version, **self.options)


class ExportedBefore1(Exported):
    """Knows nothing of DLPack 1.0: no versions, no flags."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__(stream=stream)


class Mutable(ExportedBefore1):
    """The same with item assignment."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[key] = value


class OfALibrary(Exported):
    """An array type with a library that takes results over, as the array API standard has it."""

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda x: OfALibrary(np.from_dlpack(x)))


class OnCuda:
    """Has ``__cuda_array_interface__`` only, like Numba's device arrays."""

    def __init__(self, shape: tuple[int, ...] = (4,)) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (0xDEAD000, False),
            "strides": None,
            "version": 3,
        }
