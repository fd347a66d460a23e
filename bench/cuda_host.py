"""``python -m bench.cuda_host``: what calls on a GPU cost the host, in parts. Some 15 s.

    before    from the call to its first launch: arguments, checks, tables, memory
    launches  inside the extension, launching (the GPU works at the same time)
    wait      for the report: what the GPU has left to do, and its copy
    python    everything else: between launches, and from the report to the result

Medians in microseconds of warm calls on the host's clock. A call takes about before + what the GPU
takes + the copy + what of `python` comes after the report.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

import piece_ops
from piece_ops.backends import _cuda_runtime

PARTS = ("before", "launches", "wait", "python")
Span = tuple[float, float]


def timed(function: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    """The same function; when it ran is added to `spans`."""

    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spans.append((start, time.perf_counter()))

    return call


@contextmanager
def watched(launches: list[Span], reads: list[Span]) -> Iterator[None]:
    """Inside, when the backend launches and when it reads reports is noted."""
    runtime = _cuda_runtime.runtime
    module = runtime.module("select_topk")
    plain = module.CudaSelectTopk

    def selection(*arguments: Any) -> Any:
        made = plain(*arguments)
        names = ("table", "exclude_table", "large_scopes", "ways", "scratch_bytes")
        return SimpleNamespace(
            **{name: getattr(made, name) for name in names},
            launch=timed(made.launch, launches),
            small_launch=timed(made.small_launch, launches),
        )

    proxy = SimpleNamespace(**{name: getattr(module, name) for name in dir(module)})
    proxy.CudaSelectTopk = selection
    proxy.cuda_accumulate_squares = timed(module.cuda_accumulate_squares, launches)
    proxy.cuda_read_words = timed(module.cuda_read_words, reads)
    _cuda_runtime.forget_tables()  # the plans over them hold selections that are not watched
    runtime.module = lambda op: proxy  # type: ignore[method-assign]
    try:
        yield
    finally:
        del runtime.module
        _cuda_runtime.forget_tables()


def parts_of(run: Callable[[], Any], repeats: int) -> list[float]:
    """Medians in microseconds, in the order of `PARTS`."""
    launches: list[Span] = []
    reads: list[Span] = []
    found = []
    with watched(launches, reads):
        for number in range(repeats + 3):
            torch.cuda.synchronize()
            launches.clear()
            reads.clear()
            start = time.perf_counter()
            result = run()
            end = time.perf_counter()
            del result
            before = launches[0][0] - start
            inside, wait = (sum(b - a for a, b in spans) for spans in (launches, reads))
            if number >= 3:
                found.append((before, inside, wait, end - start - before - inside - wait))
    return [1e6 * statistics.median(column) for column in zip(*found, strict=True)]


def calls(n: int, counts: Sequence[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same n scores, as few and as many tensors."""
    for count in counts:
        grads = list(torch.rand(n, device="cuda").split(n // count))
        squares = list(torch.zeros(n, device="cuda").split(n // count))
        maxima = piece_ops.ChunkMaxima()
        k = max(1, n // 1000)

        def select(x: Any = grads, k: int = k) -> Any:
            return piece_ops.select_topk(x, k)

        def accumulate(x: Any = squares, grads: Any = grads) -> None:
            piece_ops.accumulate_squares_(x, grads)

        def fused(x: Any = squares, grads: Any = grads, maxima: Any = maxima, k: int = k) -> Any:
            piece_ops.accumulate_squares_(x, grads, maxima=maxima)
            return piece_ops.select_topk(x, k, maxima=maxima)

        of = f"{count:,} tensor{'s' * (count > 1)}"
        yield f"select_topk, {of}", select
        yield f"accumulate_squares_, {of}", accumulate
        yield f"accumulate_squares_ and select_topk by its maxima, {of}", fused


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_host", description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 10_000])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.cuda_host: wanted a CUDA device, got none")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, n = {args.n:,}; us")
    print(f"{'':64}" + "".join(f"{part:>10}" for part in PARTS))
    for name, run in calls(args.n, args.tensors):
        numbers = parts_of(run, args.repeats)
        print(f"{name:64}" + "".join(f"{number:10.1f}" for number in numbers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
