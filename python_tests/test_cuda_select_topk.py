"""select_topk on emulated CUDA kernels: the CPU's bits, whatever the input and the way taken.

The contract tests of test_select_topk.py run on the emulated kernels too; these here are about what
only this backend has: tiles, alignment, maxima, rounds, scratch, the order of blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from piece_ops import functional
from piece_ops.backends import _cuda_runtime, cpu, cuda, cuda_select_topk
from piece_ops.backends.cuda_select_topk import Arguments, select
from piece_ops.functional import Score, select_topk

from helpers import emulated
from helpers.cases import (
    BF16,
    DISTRIBUTIONS,
    DTYPES,
    EDGE_SIZES,
    F16,
    F32,
    F64,
    NAN_DISTRIBUTIONS,
    cut,
    draw,
    pick,
    select_cases,
    some_positions,
)
from helpers.compare import assert_bits_equal, assert_same_selection
from helpers.emulated_select_topk import sampled_positions

ALGORITHMS = ("auto", "filter", "radix")
TILE, SPARSE_TILE, SMALL = 4096, 32768, 65536  # csrc/cuda/select_topk_types.h, ops/select_topk.h
NAN = float("nan")


@pytest.fixture(scope="module")
def extension() -> Iterator[ModuleType]:
    named = os.environ.get("PIECE_OPS_EMULATION")
    module = emulated.load(Path(named) if named else emulated.build("plain"))
    with emulated.emulation(module):
        module.set_device(2, 2)
        yield module
        module.set_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are given holds garbage, so what they forget to write shows."""

    def poisoned(place: Any, words: int) -> Tensor:
        return torch.full((words,), 0x7EDCBA9876543210, dtype=torch.int64)

    monkeypatch.setattr(cuda_select_topk, "_empty", poisoned)


def run(
    first: Sequence[Tensor],
    k: int | list[int],
    second: Sequence[Tensor] = (),
    exclude: Sequence[Tensor] = (),
    score: str = "plain",
    constant: float = 0.0,
    nan: str = "raise",
    algorithm: str = "auto",
    maxima: Sequence[Tensor] = (),
) -> list[str]:
    """Compare with the CPU's result; the ways that were tried."""
    ks = k if isinstance(k, list) else [k]
    arguments = (list(first), list(second), ks, list(exclude), score, constant, 7, nan, algorithm)
    ways: list[str] = []
    got = select(Arguments(*arguments, list(maxima)), ways).tensors()
    want = cpu.select_topk(*arguments)
    for name, a, b in zip(("indices", "counts", "thresholds", "ties"), got, want, strict=True):
        if name == "thresholds":  # NaN are alike
            assert repr(a.tolist()) == repr(b.tolist()), f"{name}: {a} is not {b}, by {ways}"
        else:
            assert_bits_equal(a, b, f"{name} by {ways}")
    return ways


def on_cuda(scores: Any, k: Any, **options: Any) -> Any:
    """``piece_ops.select_topk`` by way of the CUDA backend."""
    ops = functional._ops
    functional._ops = SimpleNamespace(select_topk=cuda_select_topk.select_topk)
    try:
        return select_topk(scores, k, **options)
    finally:
        functional._ops = ops


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


# ---- the same bits as the CPU -----------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_equals_the_cpu(
    extension: ModuleType, dtype: str, distribution: str, rng: Generator
) -> None:
    sizes = (pick(rng, EDGE_SIZES), pick(rng, EDGE_SIZES), 4099)
    for case in select_cases(DTYPES.get(dtype), distribution, rng, sizes):
        want = select_topk(case.scores, case.k, **case.options)
        got = on_cuda(case.scores, case.k, **case.options)
        assert_same_selection(got, want, f"{dtype} {case.name}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n", [TILE - 1, TILE, TILE + 1, 3 * TILE + 5, SPARSE_TILE + 1, SMALL + 1])
def test_edges_of_tiles(extension: ModuleType, n: int, algorithm: str, rng: Generator) -> None:
    for dtype in DTYPES.values():
        x = draw("gaussian_squared", n, dtype, rng)
        for k in (1, n // 1000 + 1, n // 3, n):
            run([x, x[:0], x], k, algorithm=algorithm)
        run([draw("few_values", n, dtype, rng)], n // 7, algorithm=algorithm)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_large_arrays(extension: ModuleType, distribution: str, rng: Generator) -> None:
    nan = "lowest" if distribution in NAN_DISTRIBUTIONS else "raise"
    dtype = pick(rng, tuple(DTYPES.values()))
    parts = cut(draw(distribution, 2 * SMALL + 77, dtype, rng), 5, rng)
    for algorithm in ALGORITHMS:
        for k in (131, 20_000, 100_000):
            run(parts, k, nan=nan, algorithm=algorithm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(extension: ModuleType, dtype: str, rng: Generator) -> None:
    base = draw("normal", 2 * TILE + 100, DTYPES[dtype], rng)
    other = draw("normal", 2 * TILE + 101, F32, rng)
    for start in (0, 1, 2, 3, 5, 7, 8):
        for algorithm in ALGORITHMS:
            run([base[start:], base[start : start + 3]], 500, algorithm=algorithm)
        if DTYPES[dtype] == F64:
            continue
        run([base[start:]], 500, [other[1 : 1 + base.numel() - start]], score="snip")
        run([base[start : start + 2 * TILE]], 50, [base[8 : 8 + 2 * TILE]], score="snip")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_tensors(extension: ModuleType, algorithm: str, rng: Generator) -> None:
    tiny = [draw("few_values", n % 5, F32, rng) for n in range(2000)]
    run(tiny, 1500, algorithm=algorithm)
    run(tiny, [t.numel() // 2 for t in tiny], algorithm=algorithm)
    run([torch.empty(0)] * 5 + [torch.ones(3)] + [torch.empty(0)] * 5, 2, algorithm=algorithm)
    run([torch.empty(0)] * 3, 0, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", ["piece-s", "piece-g", "snip", "taylor", "magnitude", "random"])
def test_scores(extension: ModuleType, kind: str, algorithm: str, rng: Generator) -> None:
    sizes = (SMALL + 9, 0, 4099, 17)
    for dtype, other in ((F32, F32), (F32, BF16), (BF16, F16), (F16, F32)):
        first = [draw("normal", n, dtype, rng) for n in sizes]
        second = [draw("gaussian_squared", n, other, rng) for n in sizes]
        given = second if kind in ("piece-s", "piece-g", "snip", "taylor") else []
        exclude = [some_positions(n, 0.05, rng) for n in sizes]
        for k in (70, [60, 0, 3000, 1]):
            run(first, k, given, score=kind, constant=0.25, algorithm=algorithm)
            run(first, k, given, exclude, score=kind, constant=0.25, algorithm=algorithm)


@pytest.mark.parametrize("kind", ["piece-s", "piece-g"])
@pytest.mark.parametrize("bound", [1e-16, 1e-14, 1e-3, 1.0, 3e4])
@pytest.mark.parametrize("scale", [1.0, 1e-38])
def test_scores_some_roundings_from_the_bound(
    extension: ModuleType, kind: str, bound: float, scale: float, rng: Generator
) -> None:
    """The cheap comparison (select_topk_quick.h) rules out none that the division keeps."""
    n, constant = 5 * TILE, 0.25 * (scale == 1)
    second = draw("gaussian_squared", n, F32, rng) * scale
    v = (second + constant).double()
    wide, near = torch.randint(-400, 400, (2, n), generator=rng) * 2.0**-26
    for part in (near / 8, wide):
        first = (v.sqrt() if kind == "piece-s" else v) * bound * (1 + part)
        first *= torch.randint(2, (n,), generator=rng) * 2 - 1
        for k in (n // 50, n // 5):
            for algorithm in ALGORITHMS:
                run([first.float()], k, [second], (), kind, constant, "lowest", algorithm)


@pytest.mark.parametrize("kind", ["piece-s", "piece-g"])
def test_scores_of_any_bits(extension: ModuleType, kind: str, rng: Generator) -> None:
    """NaN, infinities, numbers below the smallest normal one and products that overflow."""
    n = 6 * TILE
    first, second = torch.randint(-(2**31), 2**31, (2, n), generator=rng).int().view(F32)
    for given in (second, second.abs(), second.abs() * 1e-38):
        for constant in (0.0, 1e-40, 1e-10, 1e10):
            for k in (20, n // 50, n // 5):
                run([first], k, [given], (), kind, constant, nan="lowest")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_exclude(extension: ModuleType, algorithm: str, rng: Generator) -> None:
    sizes = (SMALL + 1, 0, 5000, 40)
    for name in ("gaussian_squared", "few_values", "all_zero"):
        scores = [draw(name, n, F32, rng) for n in sizes]
        for share in (0.001, 0.3, 0.99):
            exclude = [some_positions(n, share, rng) for n in sizes]
            free = sum(sizes) - sum(e.numel() for e in exclude)
            for k in (0, 1, free // 50, free):
                run(scores, k, exclude=exclude, algorithm=algorithm)
    # The usual case: what was selected before, so the largest of all.
    before = torch.cat([t.flatten() for t in scores]).numel() // 1000
    top = select_topk(scores, before)
    run(scores, before, exclude=top.indices, algorithm=algorithm)


def test_scope_tensor_mixes_small_and_large(extension: ModuleType, rng: Generator) -> None:
    sizes = (SMALL, SMALL + 1, 0, 3, 2 * SMALL, SMALL + 5)
    scores = [draw("lognormal4", n, F32, rng) for n in sizes]
    exclude = [some_positions(n, 0.01, rng) for n in sizes]
    for algorithm in ALGORITHMS:
        run(scores, [65, 65, 0, 2, 100, 0], algorithm=algorithm)
        run(scores, [65, 65, 0, 2, 100, 0], exclude=exclude, algorithm=algorithm)


# ---- NaN and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_is_reported_like_the_cpu_does(
    extension: ModuleType, algorithm: str, rng: Generator
) -> None:
    scores = [draw("normal", n, F32, rng) for n in (5000, 3, SMALL + 3, 50)]
    scores[2][17::1000] = NAN
    scores[3][:] = NAN
    for k in (1, 500, [1, 1, 1, 1]):
        options = {"algorithm": algorithm, "scope": "tensor" if isinstance(k, list) else "global"}
        want = error_of(lambda k=k, o=options: select_topk(scores, k, **o))
        assert error_of(lambda k=k, o=options: on_cuda(scores, k, **o)) == want
    for k in (1, 500, sum(t.numel() for t in scores) - 3):
        run(scores, k, nan="lowest", algorithm=algorithm)


@pytest.mark.parametrize("wrong", [[3, 2], [5, 5], [-1, 4], [4, 10**12]])
def test_wrong_exclude_is_reported_like_the_cpu_does(
    extension: ModuleType, wrong: list[int], rng: Generator
) -> None:
    scores = [draw("normal", n, F32, rng) for n in (10, 5000, SMALL + 1)]
    exclude = [torch.tensor([1]), torch.tensor([7, 2000, *range(3000, 4500)]), torch.tensor(wrong)]
    for algorithm in ALGORITHMS:
        for k in (20, [2, 2, 2]):
            scope = "tensor" if isinstance(k, list) else "global"
            options = {"algorithm": algorithm, "exclude": exclude, "scope": scope}
            want = error_of(lambda o=options: select_topk(scores, 20, **{**o, "scope": "global"}))
            assert error_of(lambda k=k, o=options: on_cuda(scores, k, **o)) == want


# ---- maxima -----------------------------------------------------------------------------------


def maxima_of(first: Sequence[Tensor], kind: str = "plain", *others: Any) -> list[Tensor]:
    """The largest score of every 32 elements; NaN where one is NaN."""
    del others
    found = []
    for tensor in first:
        x = tensor.float().abs() if kind == "magnitude" else tensor.float()
        padded = torch.nn.functional.pad(x, (0, -x.numel() % 32), value=-float("inf"))
        found.append(padded.view(-1, 32).amax(1) if x.numel() else x)
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "distribution",
    ["gaussian_squared", "few_values", "all_zero", "zeros_99", "run_of_large", "infinities"],
)
def test_maxima_change_nothing(
    extension: ModuleType, distribution: str, algorithm: str, rng: Generator
) -> None:
    sizes = (2 * SPARSE_TILE + 5, 0, 31, 32, 33, SPARSE_TILE, 4097)
    for dtype in (F32, BF16, F16):
        first = [draw(distribution, n, dtype, rng) for n in sizes]
        exclude = [some_positions(n, 0.002, rng) for n in sizes]
        for k in (0, 1, 103, 3000):
            run(first, k, algorithm=algorithm, maxima=maxima_of(first))
            run(first, k, exclude=exclude, algorithm=algorithm, maxima=maxima_of(first))
        odd = [t[1:] for t in first if t.numel()]
        run(odd, 103, algorithm=algorithm, maxima=maxima_of(odd))
        negative = [-t for t in first]
        run(negative, 103, algorithm=algorithm, maxima=maxima_of(negative))


def test_maxima_of_a_score(extension: ModuleType, rng: Generator) -> None:
    sizes = (2 * SPARSE_TILE + 5, 4097)
    first = [draw("normal", n, F32, rng) for n in sizes]
    second = [draw("gaussian_squared", n, F32, rng) for n in sizes]
    scores = [a.abs() / (b + 0.5).sqrt() for a, b in zip(first, second, strict=True)]
    for algorithm in ALGORITHMS:
        run(
            first,
            103,
            second,
            score="piece-s",
            constant=0.5,
            algorithm=algorithm,
            maxima=maxima_of(scores),
        )
        maxima = maxima_of(first, "magnitude")
        run(first, 103, score="magnitude", algorithm=algorithm, maxima=maxima)


@pytest.mark.parametrize("kind", ["plain", "piece-s", "piece-g", "magnitude", "snip", "taylor"])
def test_maxima_left_by_the_last_accumulation(
    extension: ModuleType, kind: str, rng: Generator
) -> None:
    sizes = (2 * SPARSE_TILE + 5, 0, 31, 4097)
    grads = [draw("lognormal4", n, F32, rng) for n in sizes]
    squares, sums = ([torch.zeros(n) for n in sizes] for _ in range(2))
    other = [draw("normal", n, BF16, rng).abs() for n in sizes]
    maxima = [torch.empty((n + 31) // 32) for n in sizes]
    second = other if kind in ("piece-g", "snip", "taylor") else []
    for _ in range(2):
        cuda.accumulate_squares_and_maxima_(
            squares, grads, sums, 0.5, maxima, kind, second, constant=0.25
        )
    first = squares if kind in ("plain", "taylor") else sums
    given = squares if kind == "piece-s" else second
    for algorithm in ALGORITHMS:
        for k in (1, 103, 1000):
            run(first, k, given, (), kind, 0.25, algorithm=algorithm, maxima=maxima)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_under_maxima(extension: ModuleType, algorithm: str, rng: Generator) -> None:
    scores = [draw("normal", n, F32, rng) for n in (SPARSE_TILE + 3, 5000)]
    scores[1][7::100] = NAN
    maxima = maxima_of(scores)
    for k in (1, 103):
        run(scores, k, nan="lowest", algorithm=algorithm, maxima=maxima)
        arguments = (scores, [], [k], [], "plain", 0.0, 0, "raise", algorithm)
        want = error_of(lambda a=arguments: cpu.select_topk(*a))
        got = error_of(lambda a=arguments: select(Arguments(*a, maxima)))
        assert got == want


def test_only_chunks_that_reach_the_bound_are_read(extension: ModuleType, rng: Generator) -> None:
    """What lies in the other chunks is changed behind the maxima's back: the result stays."""
    x = draw("gaussian_squared", 4 * SPARSE_TILE, F32, rng)
    maxima = maxima_of([x])
    want = cpu.select_topk([x], [], [100], [], "plain", 0.0, 0, "raise", "auto")
    low = maxima[0] < maxima[0].topk(400).values.min()
    x.view(-1, 32)[low] = NAN
    for algorithm in ALGORITHMS:
        arguments = ([x], [], [100], [], "plain", 0.0, 0, "raise", algorithm)
        ways: list[str] = []
        got = select(Arguments(*arguments, maxima), ways).tensors()
        if ways == ["maxima"]:
            assert_bits_equal(got[0], want[0])
    assert ways == ["maxima"]


def test_wrong_maxima_are_refused(extension: ModuleType) -> None:
    x = torch.zeros(100)
    for maxima in ([torch.zeros(3)], [torch.zeros(4), torch.zeros(1)]):
        with pytest.raises(ValueError, match="maxima"):
            run([x], 1, maxima=maxima)
    with pytest.raises(TypeError, match="maxima"):
        run([x], 1, maxima=[torch.zeros(4, dtype=F64)])


# ---- rounds -----------------------------------------------------------------------------------


def test_a_sample_that_sees_all_large_scores_misses(extension: ModuleType, rng: Generator) -> None:
    n = 4 * SMALL
    x = draw("gaussian_squared", n, F32, rng)
    x[sampled_positions(n)[::8]] += 1000  # one in 8 of the sample, but one in 256 of all
    assert run([x], 10_000) == ["sample", "resample"]
    assert run([x], 10_000, algorithm="filter") == ["sample", "resample"]
    assert run([x], 10_000, algorithm="radix") == ["digits"]


def test_a_sample_that_sees_no_large_score_overflows(extension: ModuleType, rng: Generator) -> None:
    n = 4 * SMALL
    x = draw("gaussian_squared", n, F32, rng)
    x += 1000
    x[sampled_positions(n)] -= 1000
    assert run([x], 300) == ["sample", "resample"]
    x[17::1000] = NAN
    run([x], 300, nan="lowest")


def test_a_miss_with_maxima_tries_their_digits(extension: ModuleType, rng: Generator) -> None:
    n = 4 * SMALL
    x = draw("gaussian_squared", n, F32, rng)
    x[sampled_positions(n)[::8]] += 1000
    assert run([x], 4000, maxima=maxima_of([x])) == ["sample", "maxima"]
    assert run([x], 10_000, maxima=maxima_of([x])) == ["sample", "resample"]  # more than chunks
    assert run([x], 100, algorithm="radix", maxima=maxima_of([x])) == ["maxima"]
    sorted_scores = torch.arange(n).float()  # 2000 chunks are 64,000 scores: past the room
    maxima = maxima_of([sorted_scores])
    assert run([sorted_scores], 2000, maxima=maxima, algorithm="radix") == ["maxima", "digits"]


def test_one_round_reads_one_report(
    extension: ModuleType, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the device but the copy of the report."""
    scores = [draw("gaussian_squared", n, F32, rng) for n in (SMALL, 5000)]
    copies = []
    read, to_host = _cuda_runtime.Place.read, Tensor.cpu
    monkeypatch.setattr(
        _cuda_runtime.Place, "read", lambda p, t: (copies.append(t.numel()), read(p, t))[1]
    )
    monkeypatch.setattr(Tensor, "cpu", lambda t, *a: (copies.append(t.numel()), to_host(t, *a))[1])
    for method in ("item", "tolist"):
        original = getattr(Tensor, method)

        def checked(t: Tensor, _original: Any = original, _method: str = method) -> Any:
            assert t.data_ptr() not in (x.data_ptr() for x in scores), _method
            return _original(t)

        monkeypatch.setattr(Tensor, method, checked)
    arguments = (scores, [], [70], [], "plain", 0.0, 0, "raise", "auto")
    cuda_select_topk.select_topk(*arguments)
    assert len(copies) == 1


# ---- order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_blocks_and_shape_of_the_chip(
    extension: ModuleType, seed: int, rng: Generator
) -> None:
    scores = [draw("few_values", n, F32, rng) for n in (SMALL + 9, 5000, 0, 3 * TILE)]
    scores[0][::3] = draw("lognormal4", scores[0][::3].numel(), F32, rng)
    extension.set_seed(seed)
    try:
        for shape in ((1, 1), (2, 3), (132, 8)):
            extension.set_device(*shape)
            for algorithm in ALGORITHMS:
                for k in (100, 9000, 60_000):
                    run(scores, k, algorithm=algorithm)
            run(scores, 100, algorithm="radix", maxima=maxima_of(scores))
            run(scores, 100, maxima=maxima_of(scores))
            run(scores, [99, 50, 0, 7])
    finally:
        extension.set_seed(0)
        extension.set_device(2, 2)


def test_inputs_are_untouched(extension: ModuleType, rng: Generator) -> None:
    scores = [draw("with_nan_inf", n, F32, rng) for n in (SMALL + 1, 0, 10)]
    exclude = [some_positions(t.numel(), 0.1, rng) for t in scores]
    kept = [t.clone() for t in [*scores, *exclude]]
    for algorithm in ALGORITHMS:
        on_cuda(scores, 50, exclude=exclude, nan="lowest", algorithm=algorithm)
    for got, want in zip([*scores, *exclude], kept, strict=True):
        assert_bits_equal(got, want)


def test_score_objects(extension: ModuleType, rng: Generator) -> None:
    sums = {"a": torch.randn(300, generator=rng), "b": torch.randn(7000, generator=rng)}
    squares = {name: t * t for name, t in sums.items()}
    score = Score("piece-s", sums, squares, constant=1.0)
    assert_same_selection(on_cuda(score, 100), select_topk(score, 100), "piece-s of a dict")
