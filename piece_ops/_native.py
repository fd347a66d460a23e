"""Loads the compiled extension and says what it holds.

The extension (``piece_ops._C``) takes addresses and sizes, so it fits every torch version. If it
is missing, importing the package still works; the first op says how to build it.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch

_extension: ModuleType | None = None


def extension() -> ModuleType:
    """Return the extension module, loading it at the first call.

    Raises
    ------
    RuntimeError
        If it was not built for this Python, with what to do.
    ValueError
        If ``PIECE_OPS_ISA`` names an instruction set that this build or CPU does not have.
    """
    global _extension
    if _extension is None:
        try:
            module = importlib.import_module("piece_ops._C")
        except ImportError as error:
            raise RuntimeError(
                "piece_ops: the compiled extension piece_ops._C cannot be loaded "
                f"({error}); build it with `pip install .` (or `pip install -e .`) in the "
                "source tree"
            ) from error
        module.active_isa()  # an unknown PIECE_OPS_ISA fails here, not in the middle of some op
        _extension = module
    return _extension


def describe() -> dict[str, Any]:
    """Say what this build holds and what is live.

    Returns
    -------
    dict
        ``version``, ``torch``, ``extension`` (path), ``isa`` (the live instruction set), ``isas``
        (all this build holds and this CPU runs), ``isa_forced`` (value of ``PIECE_OPS_ISA`` or
        None), ``threads``, ``cuda_architectures`` (compiled in; empty: none), ``gpu`` (name of
        the current CUDA device as torch sees it, or None).

    Examples
    --------
    >>> from piece_ops import _native
    >>> _native.describe()["isa"] in _native.describe()["isas"]
    True
    """
    module = extension()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "version": module.version,
        "torch": torch.__version__,
        "extension": module.__file__,
        "isa": module.active_isa(),
        "isas": module.supported_isas(),
        "isa_forced": os.environ.get("PIECE_OPS_ISA") or None,
        "threads": torch.get_num_threads(),
        "cuda_architectures": list(module.cuda_architectures),
        "gpu": gpu,
    }


def read_bandwidth_probe(tensor: torch.Tensor) -> None:
    """Read a contiguous CPU tensor's bytes once, as fast as a plain loop can.

    The denominator of the benchmarks: what "one read of the scores" costs on this machine, with
    torch's thread count and the live instruction set.
    """
    extension().read_bandwidth_probe(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())
