"""Runs of the command line that are killed at chosen moments, as ``kill -9`` does.

A server process imports everything once and forks a child for each run, so that a run of a second
does not cost five seconds of imports. The signal hits the child only.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import tqdm
from safetensors import safe_open

from piece_ops import cli
from piece_ops._files import is_temporary

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("piece_ops.cli", "piece_ops.training", "peft", "jinja2", "matplotlib.figure"),
        "transformers.models.llama.modeling_llama",
    ]
)


def _child(arguments: Sequence[str], log: str, event: int | str) -> None:
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a kill would leave
    seen = _die_at(event)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = cli.main(arguments)
    os.write(1, f"\nevents {seen[0]}\n".encode())
    os._exit(status)


def _die_at(event: int | str) -> list[int]:
    """Let the process kill itself just before the `event`-th flush or renaming; count them.

    An event that is a text is the first renaming to a path that ends with it.
    """
    seen = [0]

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            seen[0] += 1
            at = seen[0] if isinstance(event, int) else str(arguments[-1])[-len(event) :]
            if at == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return call

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, watched(getattr(os, name)))
    return seen


def start(arguments: Sequence[str], log: Path, event: int | str = 0) -> BaseProcess:
    """Start ``piece-ops <arguments>`` in a process of its own; its output goes to `log`."""
    process = CONTEXT.Process(target=_child, args=(list(arguments), str(log), event))
    process.start()
    return process


def warm_up(log: Path) -> None:
    """Let the server do its imports, so that no run is timed with them."""
    start(["info"], log).join()


def run_to_end(arguments: Sequence[str], log: Path) -> float:
    """Run it, which must succeed; return the seconds."""
    begin = time.perf_counter()
    process = start(arguments, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return time.perf_counter() - begin


def run_and_kill(arguments: Sequence[str], log: Path, seconds: float) -> bool:
    """Kill it after `seconds`; return whether it was still at work."""
    process = start(arguments, log)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    assert process.exitcode == 0, log.read_text()
    return False


def run_until_event(arguments: Sequence[str], log: Path, event: int | str) -> bool:
    """Let it die just before an event (see `_die_at`); return whether it came to that."""
    process = start(arguments, log, event)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return process.exitcode != 0


def events(log: Path) -> int:
    """How many flushes and renamings the last run to its end had."""
    lines = log.read_text().splitlines()
    return int([line for line in lines if line.startswith("events ")][-1].split()[1])


def check_readable(folder: Path) -> None:
    """Read every file of a run whole; what is being written has a temporary name."""
    for path in folder.rglob("*"):
        if any(is_temporary(part) for part in (path, *path.parents)):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".html", ".png"):
            end = b"</html>" if path.suffix == ".html" else b"IEND\xaeB`\x82"
            assert path.read_bytes().endswith(end)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    file.get_tensor(name)


def outcome(folder: Path) -> dict[str, object]:
    """Return all that a run must give again: its files' content, times aside."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("report"):  # shows times
            continue
        if path.suffix == ".json" and path.parent == folder:
            found[name] = _untimed(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".safetensors":
            found[name] = _content(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def _content(path: Path) -> dict[str, object]:
    """Header and tensors of a file; safetensors writes the entries of a header in any order."""
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = dict(file.metadata() or {})
        if "info" in header:
            header["info"] = _untimed(json.loads(header["info"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return {"header": header, **{name: _bits(tensor) for name, tensor in tensors.items()}}


def _bits(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    content = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), list(tensor.shape), content


def _untimed(value: object) -> object:
    times = {"seconds", "base_seconds", "started", "written", "peak_rss_bytes"}
    times |= {"memory", "base_memory"}
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in times}
    if isinstance(value, list):
        return [_untimed(item) for item in value]
    return value
