"""One place that turns a missing optional dependency into a sentence that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, used_by: str, install: str = "piece_ops[train]") -> ModuleType:
    """Import `module`, which the ``train`` extra brings.

    Parameters
    ----------
    module : str
        Name to import, for instance ``"transformers"``.
    used_by : str
        What needs it, for the error text.
    install : str
        What to install when it is missing.

    Returns
    -------
    ModuleType
        The imported module.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed; the text names the extra.

    Examples
    --------
    >>> require("json", "an example").loads("1")
    1
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, something that it needs is not: its own message is right
        raise ModuleNotFoundError(
            f"{used_by} needs the Python package {module.split('.')[0]}, which is not installed: "
            f"pip install {install}",
            name=module,
        ) from error
