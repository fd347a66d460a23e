"""One process of the emulated tests: small cases of every op, against the CPU backend, bit for bit.

``python emulated_worker.py run [KIND ...]`` runs them once (all, or those of some kinds of `CASES`)
and ends with 0 if everything agrees.
``python emulated_worker.py mutants <file>:<line> ...`` forks a child for every barrier named, which
leaves that barrier out, and prints as JSON how each child ended: 0 nothing noticed, 1 wrong result,
2 an error of the emulation (a deadlock, say), 66 ThreadSanitizer's report, negative a signal.

PIECE_OPS_EMULATION names the extension. Sanitizers need this process to be started for them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.cases import BF16, F16, F32, F64, draw, pick, some_positions
from helpers.compare import bits
from helpers.emulated import cuda_implementations, emulation, load

OPS = torch.ops.piece_ops
MUTANT_SECONDS = 60  # a child that hangs is noticed too


def same(got: Any, want: Any, what: str) -> None:
    """Both tensors, or lists of them, have the same bytes."""
    for t, (a, b) in enumerate(zip(_list(got), _list(want), strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bits(a), bits(b)):
            print(f"differs: {what}, tensor {t}", file=sys.stderr)
            raise SystemExit(1)


def _list(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def tensors(g: torch.Generator, sizes: tuple[int, ...], dtypes: tuple[Any, ...]) -> list[Tensor]:
    """Some of them views that start at odd addresses."""
    found = []
    for n in sizes:
        offset = pick(g, (0, 0, 1, 3))
        found.append(draw("normal", n + offset, pick(g, dtypes), g)[offset:])
    return found


Run = Callable[[], Any]
SIZES = (0, 1, 31, 32, 33, 257, 4096, 4097, 9001)


def case_accumulate(g: torch.Generator, cuda: dict[str, Any]) -> Iterator[tuple[str, Run, Run]]:
    for has_squares, has_sums in ((True, False), (True, True), (False, True)):
        grads = tensors(g, SIZES, (F32, BF16, F16))

        def run(op: Any, grads: Any = grads, a: bool = has_squares, b: bool = has_sums) -> Any:
            squares = [torch.full((x.numel(),), 0.5) for x in grads] if a else []
            sums = [torch.full((x.numel(),), -0.25) for x in grads] if b else []
            op(squares, grads, sums, 0.3)
            return squares + sums

        yield (
            f"accumulate_squares_ {has_squares} {has_sums}",
            lambda run=run: run(cuda["accumulate_squares_"]),
            lambda run=run: run(OPS.accumulate_squares_),
        )


def case_slots(g: torch.Generator, cuda: dict[str, Any]) -> Iterator[tuple[str, Run, Run]]:
    weights = tensors(g, SIZES, (F32, BF16, F16))
    indices = [some_positions(w.numel(), 0.4, g) for w in weights]
    values = [torch.randn(i.numel(), generator=g) for i in indices]
    for is_dense in (False, True):
        like = weights if is_dense else indices
        grads = [draw("normal", x.numel(), pick(g, (F32, BF16)), g) for x in like]

        def run(op: Any, grads: Any = grads) -> Any:
            lists = [[x.clone() for x in values] for _ in range(3)]
            lists[2] = [x.abs() for x in lists[2]]
            new = [w.clone() for w in weights]
            op(new, indices, lists[0], grads, lists[1], lists[2], 3, 1e-2, 0.9, 0.999, 1e-8, 0.1)
            return [*new, *lists[0], *lists[1], *lists[2]]

        yield (
            f"sparse_adamw_ dense={is_dense}",
            lambda run=run: run(cuda["sparse_adamw_"]),
            lambda run=run: run(OPS.sparse_adamw_),
        )
    yield (
        "gather",
        lambda: cuda["gather"](weights, indices, F32),
        lambda: OPS.gather(weights, indices, F32),
    )

    def scatter(op: Any) -> Any:
        new = [w.clone() for w in weights]
        op(new, indices, values)
        return new

    yield "scatter_", lambda: scatter(cuda["scatter_"]), lambda: scatter(OPS.scatter_)


def case_total(g: torch.Generator, cuda: dict[str, Any]) -> Iterator[tuple[str, Run, Run]]:
    for sizes in (SIZES, (70_000, 0, 3), tuple([1] * 2100)):  # 2100: more tile sums than one chunk
        x = tensors(g, sizes, (F32, BF16, F16, F64))
        yield f"total {len(sizes)}", lambda x=x: cuda["total"](x), lambda x=x: OPS.total(x)


def case_sampled(g: torch.Generator, cuda: dict[str, Any]) -> Iterator[tuple[str, Run, Run]]:
    """Several windows of rows in a chunk of indices and the reverse, odd tokens, every dtype.

    Rows begin at 16 bytes or they do not.
    """
    op = "sampled_weight_grad"
    for tokens, out, width, share in ((1, 5, 3, 1.0), (300, 70, 19, 0.2), (530, 40, 33, 0.05)):
        for dtypes in ((F32, BF16), (BF16, F16), (F16, F32)):
            grads, x = (
                draw("normal", tokens * (n + more), dtype, g).view(tokens, n + more)[:, at : at + n]
                for n, dtype, (at, more) in zip(
                    (out, width), dtypes, ((0, -out % 8), (1, 3)), strict=True
                )
            )
            given = grads, x, some_positions(out * width, share, g)
            yield (
                f"{op} {tokens} {out} {width} {dtypes}",
                lambda given=given: cuda[op](*given),
                lambda given=given: OPS.sampled_weight_grad(*given),
            )


def case_select(g: torch.Generator, cuda: dict[str, Any]) -> Iterator[tuple[str, Run, Run]]:
    from helpers.emulated_select_topk import cases

    yield from cases(g)


CASES = {
    "accumulate_squares": case_accumulate,
    "slots": case_slots,
    "total": case_total,
    "sampled_weight_grad": case_sampled,
    "select_topk": case_select,
}


def run_cases(only: str = "") -> None:
    """Every case, or those of the kernels in the file called `only`."""
    cuda = cuda_implementations()
    kinds = [make for name, make in CASES.items() if only.startswith(name)] or CASES.values()
    for make in kinds:
        for name, emulated, native in make(torch.Generator().manual_seed(5), cuda):
            want = native()
            same(emulated(), want, name)


def run_mutants(extension: Any, sites: list[str]) -> dict[str, int]:
    """How the child without each barrier ends. The first case that notices ends it."""
    found = {}
    for site in sites:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                signal.alarm(MUTANT_SECONDS)
                file, line = site.rsplit(":", 1)
                extension.skip_barrier(file, int(line))
                run_cases(file)
                code = 0 if extension.skipped_count() else 99  # 99: never reached
            except SystemExit:
                code = 1
            except BaseException as error:
                print(f"{site}: {error}", file=sys.stderr)
            os._exit(code)
        _, status = os.waitpid(child, 0)
        found[site] = os.waitstatus_to_exitcode(status)
    return found


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    extension = load(Path(os.environ["PIECE_OPS_EMULATION"]))
    extension.set_device(2, 2)
    with emulation(extension):
        if argv[0] == "run":
            for only in argv[1:] or [""]:
                run_cases(only)
        else:
            print(json.dumps(run_mutants(extension, argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
