"""What a call costs by itself: select_topk of 10 of 10,000 numbers, from every library.

Each timed round is 100 calls: a row's milliseconds times ten are microseconds a call. The targets
are about the median of all single calls, which a busy machine hardly moves. The kernel takes 5 us
of it; the rest is Python: arguments, checks, dispatch, results. From JAX the first 256 results of a
shape take 25 us more than the others, for which a copy is compiled.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

import piece_ops
from bench.harness import Absent, Case, Peer, Role, Row, Target
from bench.inputs import gaussian_squared

N, K, CALLS = 10_000, 10, 100
TORCH, NUMPY, JAX = "piece_ops, torch", "piece_ops, numpy", "piece_ops, jax"


def one_call(threads: int) -> Case:
    scores = gaussian_squared(N)
    want = np.sort(np.argsort(-scores.numpy(), kind="stable")[:K]).tolist()
    calls: dict[str, list[int]] = {}  # nanoseconds of each, by peer

    def repeated(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        times = calls.setdefault(name, [])

        def run() -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                for _ in range(CALLS):
                    start = time.perf_counter_ns()
                    result = call()
                    times.append(time.perf_counter_ns() - start)
            finally:
                torch.set_num_threads(before)
            return result

        return run

    def microseconds(name: str) -> Callable[[dict[str, Row]], float | None]:
        return lambda rows: statistics.median(calls[name]) / 1e3 if calls.get(name) else None

    def right(result: Any) -> str | None:
        indices = result.indices if isinstance(result, piece_ops.TopK) else result
        got = sorted(indices.tolist())
        return None if got == want else f"{got} instead of {want}"

    def peer(name: str, call: Callable[[], Any], role: Role = "peer") -> Peer:
        return Peer(name, repeated(name, call), right, role, note=f"{CALLS} calls")

    def ours(name: str, array: Any) -> Peer:
        return peer(name, partial(piece_ops.select_topk, array, K), "ours")

    array = scores.numpy()
    peers = [
        ours(TORCH, scores),
        ours(NUMPY, array),
        peer("torch.topk", lambda: torch.topk(scores, K).indices),
        peer("numpy.argpartition", lambda: np.argpartition(array, N - K)[-K:]),
    ]
    targets = [
        Target("a call from torch", microseconds(TORCH), 30, at_most=True, unit="us"),
        Target("a call from numpy", microseconds(NUMPY), 60, at_most=True, unit="us"),
        Target("a call from jax", microseconds(JAX), 60, at_most=True, unit="us"),
    ]
    try:
        jax = importlib.import_module("jax")
    except ImportError as error:
        peers.append(Peer(JAX, partial(_absent, str(error)), role="ours"))
    else:
        of_jax = jax.numpy.asarray(array)
        peers.append(ours(JAX, of_jax))
        top_k = jax.jit(jax.lax.top_k, static_argnums=1)
        peers.append(peer("jax.lax.top_k", lambda: top_k(of_jax, K)[1].block_until_ready()))
    return Case("call_overhead", "fp32", N, 4 * N * CALLS, peers, targets)


def _absent(why: str) -> None:
    raise Absent(why)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    for threads in (1, 2):
        yield (
            f"{K} of {N:,} numbers, {threads} thread{'s' * (threads > 1)}",
            partial(one_call, threads),
        )
