"""select_topk: the k largest by (score, then smaller position), exactly, whatever the input."""

from __future__ import annotations

import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piece_ops import reference
from piece_ops.functional import Score, select_topk

from helpers.cases import (
    BF16,
    DISTRIBUTIONS,
    DTYPES,
    EDGE_SIZES,
    F16,
    F32,
    F64,
    LARGE_SIZES,
    NAN_DISTRIBUTIONS,
    cut,
    draw,
    fewer,
    pick,
    select_cases,
    some,
    some_positions,
)
from helpers.compare import assert_all_bits_equal, assert_same_selection, bits

ALGORITHMS = ("auto", "filter", "radix")


def check(scores: Any, k: Any, what: str = "", **options: Any) -> Any:
    """The op's answer, after comparing it with the reference's."""
    got = select_topk(scores, k, **options)
    reference_options = {key: value for key, value in options.items() if key != "algorithm"}
    want = reference.select_topk(scores, k, **reference_options)
    assert_same_selection(got, want, what or f"k={k} {options}")
    return got


# ---- matches the reference --------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_equals_the_reference(dtype: str, distribution: str, rng: torch.Generator) -> None:
    for case in select_cases(DTYPES.get(dtype), distribution, rng, EDGE_SIZES):
        check(case.scores, case.k, f"{dtype} {case.name}", **case.options)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_equals_the_reference_on_large_arrays(
    dtype: str, distribution: str, rng: torch.Generator
) -> None:
    n = pick(rng, LARGE_SIZES)
    scores = draw(distribution, n, DTYPES[dtype], rng)
    nan = "lowest" if distribution in NAN_DISTRIBUTIONS else "raise"
    for k in (n // 1000, pick(rng, (1, n // 10, n // 2, n - 1, n))):
        torch.set_num_threads(1)
        want = reference.select_topk(scores, k, nan=nan)
        torch.set_num_threads(2)
        for algorithm in ALGORITHMS:
            got = select_topk(scores, k, nan=nan, algorithm=algorithm)
            assert_same_selection(got, want, f"{dtype} {distribution} n={n} k={k} {algorithm}")


@pytest.mark.parametrize("distribution", ["run_of_large", "stride_of_large", "tail_of_large"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_exact_when_the_sample_misleads(
    distribution: str, algorithm: str, rng: torch.Generator
) -> None:
    for _ in range(min(4, fewer(16))):
        scores = draw(distribution, fewer(2**20 + 3), F32, rng)
        parts = cut(scores, 7, rng)
        for k in map(fewer, (1000, 11_000, 100_000)):
            got = select_topk(parts, k, algorithm=algorithm)
            wrong = reference.check_topk(parts, got.indices, k)
            assert wrong is None, f"{distribution} k={k}: {wrong}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_tensors(algorithm: str, rng: torch.Generator) -> None:
    for pieces in (0, 1, 2, 17, 300):
        parts = cut(draw("few_values", 5000, F32, rng), pieces, rng) if pieces else []
        check(parts, 123 if pieces else 0, f"{pieces} tensors", algorithm=algorithm)
    tiny = [draw("gaussian_squared", n % 4, F32, rng) for n in range(fewer(10_000))]
    check(tiny, fewer(1500), "10,000 tiny tensors", algorithm=algorithm)
    check(tiny, [t.numel() // 2 for t in tiny], "10,000 selections", scope="tensor")


def test_zero_dimensional_and_empty_tensors() -> None:
    assert check(torch.tensor(3.0), 1).indices.tolist() == [0]
    check([torch.tensor(1.0), torch.empty(0), torch.tensor(2.0), torch.empty(3, 0)], 1)
    check([torch.empty(0), torch.empty(0)], 0)
    check({}, 0)
    assert check(torch.empty(0), 0).threshold == math.inf


def test_tie_goes_to_the_smaller_position_across_tensors() -> None:
    top = check({"b": torch.tensor([1.0, 0.0]), "a": torch.tensor([1.0, 1.0])}, 2)
    assert top.indices["b"].tolist() == [0] and top.indices["a"].tolist() == [0]
    assert top.threshold == 1.0 and top.ties_kept == 2


def test_signed_zeros_are_equal() -> None:
    assert check(torch.tensor([-0.0, 0.0, -0.0]), 2).indices.tolist() == [0, 1]


def test_threshold_is_the_score_itself(rng: torch.Generator) -> None:
    for dtype in (F32, BF16, F16, F64):
        scores = draw("normal", 1000, dtype, rng)
        top = check(scores, 100)
        assert top.threshold == float(scores[top.indices].min())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_twice_and_for_every_thread_count(threads: int, algorithm: str) -> None:
    g = torch.Generator().manual_seed(5)  # the same data for every parameter of this test
    parts = cut(draw("few_values", fewer(2**19 + 7), F32, g), 9, g)
    parts += cut(draw("gaussian_squared", fewer(2**19 - 3), BF16, g), 9, g)
    torch.set_num_threads(threads)
    for k in map(fewer, (1000, 150_000, 700_000)):
        want = select_topk(parts, k, algorithm="radix")
        assert reference.check_topk(parts, want.indices, k) is None
        assert_same_selection(select_topk(parts, k, algorithm=algorithm), want, f"k={k}")
        assert_same_selection(select_topk(parts, k, algorithm=algorithm), want, f"k={k} again")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_flush_denormal_mode_changes_nothing(algorithm: str, rng: torch.Generator) -> None:
    large = [(fewer(2**18), fewer(k)) for k in (2000, 200_000)]
    for name in ("subnormal", "subnormal_mixed"):
        for n, k in ((100, 30), (3000, 100), (3000, 2000), *large):
            scores = draw(name, n, F32, rng)
            one = Score("magnitude", scores)
            want, want_score = reference.select_topk(scores, k), reference.select_topk(one, k)
            assert torch.set_flush_denormal(True)
            got = select_topk(scores, k, algorithm=algorithm)
            got_score = select_topk(one, k, algorithm=algorithm)
            torch.set_flush_denormal(False)
            assert_same_selection(got, want, f"{name} n={n} k={k}")
            assert_same_selection(got_score, want_score, f"magnitude of {name} n={n} k={k}")


# ---- structures, views, what is left alone ----------------------------------------------------


def test_structure_is_mirrored(rng: torch.Generator) -> None:
    x, y = torch.rand(4, 5, generator=rng), torch.rand(7, generator=rng).to(BF16)
    assert isinstance(select_topk(x, 3).indices, torch.Tensor)
    assert isinstance(select_topk([x], 3).indices, list)
    assert isinstance(select_topk((x, y), 3).indices, (list, tuple))
    assert list(select_topk({"y": y, "x": x}, 3).indices) == ["y", "x"]
    per_tensor = select_topk({"y": y, "x": x}, 2, scope="tensor")
    assert isinstance(per_tensor.threshold, dict) and isinstance(per_tensor.ties_kept, dict)
    one = select_topk(x, 2, scope="tensor")
    assert isinstance(one.threshold, float) and isinstance(one.ties_kept, int)
    with pytest.raises(AttributeError):
        one.threshold = 0.0


def test_numpy_arrays_in_numpy_arrays_out(rng: torch.Generator) -> None:
    x = torch.rand(100, generator=rng)
    array = x.numpy().copy()
    array.flags.writeable = False  # scores are only read
    top = select_topk({"w": array}, 10)
    assert isinstance(top.indices["w"], np.ndarray) and top.indices["w"].dtype == np.int64
    assert top.indices["w"].tolist() == reference.select_topk(x, 10).indices.tolist()
    half = select_topk(array.astype(np.float16), 10).indices
    assert half.tolist() == reference.select_topk(x.half(), 10).indices.tolist()


def test_views_with_an_offset_work(rng: torch.Generator) -> None:
    base = torch.randn(1001, generator=rng)
    for start in (1, 3, 17):  # not aligned to a vector
        check(base[start:], 100)
        check([base[start:500], base[500:501], base[501:]], 100)
        check(base.to(BF16)[start:], 100)


def test_weights_that_require_grad_work(rng: torch.Generator) -> None:
    weight = torch.nn.Parameter(torch.randn(50, generator=rng))
    assert not check(weight, 5).indices.requires_grad


def test_inputs_are_untouched(rng: torch.Generator) -> None:
    scores = [draw("with_nan_inf", n, F32, rng) for n in (10, 0, 100_000)]
    exclude = [some_positions(t.numel(), 0.1, rng) for t in scores]
    kept = [t.clone() for t in [*scores, *exclude]]
    versions = [t._version for t in [*scores, *exclude]]
    for algorithm in ALGORITHMS:
        select_topk(scores, 50, exclude=exclude, nan="lowest", algorithm=algorithm)
    assert_all_bits_equal([*scores, *exclude], kept)
    assert [t._version for t in [*scores, *exclude]] == versions


# ---- properties -------------------------------------------------------------------------------

floats = st.floats(width=32, allow_nan=False)
lists = st.lists(st.one_of(floats, st.sampled_from([0.0, -0.0, 1.0])), max_size=60)


@given(values=lists, data=st.data())
def test_one_more_adds_one(values: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=F32)
    k = data.draw(st.integers(0, max(0, len(values) - 1)))
    small = set(check(scores, k).indices.tolist())
    if values:
        large = set(check(scores, k + 1).indices.tolist())
        assert small < large and len(large) == k + 1


@given(values=lists, cuts=st.lists(st.integers(0, 60), max_size=5), data=st.data())
def test_cutting_into_tensors_changes_nothing(
    values: list[float], cuts: list[int], data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=F32)
    k = data.draw(st.integers(0, len(values)))
    ends = sorted(min(c, len(values)) for c in cuts)
    bounds = list(zip([0, *ends], [*ends, len(values)], strict=True))
    top = select_topk([scores[a:b] for a, b in bounds], k)
    joined = [
        i + a for (a, _), index in zip(bounds, top.indices, strict=True) for i in index.tolist()
    ]
    assert joined == select_topk(scores, k).indices.tolist()


@given(values=lists, excluded=st.sets(st.integers(0, 59)), data=st.data())
def test_excluded_is_as_if_absent(
    values: list[float], excluded: set[int], data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=F32)
    left_out = torch.tensor(sorted(i for i in excluded if i < len(values)), dtype=torch.int64)
    free = torch.tensor([i for i in range(len(values)) if i not in excluded], dtype=torch.int64)
    k = data.draw(st.integers(0, free.numel()))
    top = check(scores, k, exclude=left_out)
    assert top.indices.tolist() == free[select_topk(scores[free], k).indices].tolist()


@given(values=lists, data=st.data())
def test_threshold_and_ties_say_the_same_as_the_positions(
    values: list[float], data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=F32)
    k = data.draw(st.integers(min(1, len(values)), len(values)))
    top = select_topk(scores, k)
    above = int((scores > top.threshold).sum())
    assert above + top.ties_kept == k
    if k:
        assert 1 <= top.ties_kept <= int((scores == top.threshold).sum())


# ---- scores computed on the fly ---------------------------------------------------------------

KINDS = ("piece-s", "piece-g", "magnitude", "snip", "taylor", "random")


def score_of(kind: str, parts: list[torch.Tensor], g: torch.Generator) -> Score:
    """A Score over `parts`; the second operand positive where it is divided by."""
    second = None
    if kind in ("piece-s", "piece-g"):
        second = [torch.rand(p.shape, generator=g) for p in parts]
    elif kind in ("snip", "taylor"):
        second = [torch.randn(p.shape, generator=g).to(pick(g, (F32, BF16, F16))) for p in parts]
    first = [p.abs() for p in parts] if kind == "taylor" else parts
    return Score(kind, first, second, constant=0.125 if second else 0.0, seed=77)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_score_kinds_equal_the_reference(kind: str, algorithm: str, rng: torch.Generator) -> None:
    names = ("normal", "few_values", "zeros_99", "lognormal4")
    inputs = [(n, name) for n in (17, 1025, 4099) for name in names]
    inputs += [(n, "normal") for n in (0, 1, fewer(30_011))]
    for n, name in some(inputs, f"{kind} {algorithm}"):
        parts = cut(draw(name, n, F32, rng), 5, rng)
        score = score_of(kind, parts, rng)
        exclude = [some_positions(p.numel(), 0.1, rng) for p in parts]
        free = n - sum(e.numel() for e in exclude)
        for k in {0, min(1, free), free // 1000, free // 2, free}:
            check(score, k, f"{kind} {name} n={n} k={k}", algorithm=algorithm, exclude=exclude)
        ks = [p.numel() // 2 for p in parts]
        check(score, ks, f"{kind} {name} n={n} per tensor", scope="tensor", algorithm=algorithm)


def test_score_of_one_tensor_and_of_a_dict(rng: torch.Generator) -> None:
    s, q = torch.randn(6, 50, generator=rng), torch.rand(6, 50, generator=rng)
    assert check(Score("piece-s", s, q, constant=0.5), 20).indices.numel() == 20
    top = check(Score("snip", {"a": s, "b": q}, {"a": q, "b": s}), 20)
    assert list(top.indices) == ["a", "b"]
    shuffled = select_topk(Score("snip", {"a": s, "b": q}, {"b": s, "a": q}), 20)
    assert_all_bits_equal(shuffled.indices, top.indices, "second matched by name, not by order")


def test_random_depends_on_seed_and_position_only(rng: torch.Generator) -> None:
    n, k = 20_000, 500
    whole = select_topk(Score("random", torch.zeros(n), seed=3), k).indices
    parts = cut(torch.zeros(n), 6, rng)
    top = select_topk(Score("random", [p.to(BF16) for p in parts], seed=3), k)
    starts = np.cumsum([0, *(p.numel() for p in parts)])
    joined = [int(i) + int(s) for s, t in zip(starts, top.indices, strict=False) for i in t]
    assert joined == whole.tolist()
    other = select_topk(Score("random", torch.zeros(n), seed=4), k).indices
    assert len(set(other.tolist()) & set(whole.tolist())) < 50  # 12.5 expected by chance
    assert abs(float(whole.double().mean()) - n / 2) < 4 * n / math.sqrt(12 * k)


def test_score_that_is_nan_is_counted(rng: torch.Generator) -> None:
    s, q = [torch.ones(5), torch.zeros(5)], [torch.ones(5), torch.zeros(5)]  # 0 / sqrt(0)
    with pytest.raises(ValueError, match=r"piece_ops\.select_topk: .*\[1\].* 5 "):
        select_topk(Score("piece-s", s, q), 2)
    check(Score("piece-s", s, q), 7, nan="lowest")


def test_seed_of_every_generated_case_is_its_name() -> None:
    """The cases must differ from test to test, or thousands of them would be a few."""
    first = draw("normal", 5, F64, torch.Generator().manual_seed(zlib.crc32(b"a")))
    second = draw("normal", 5, F64, torch.Generator().manual_seed(zlib.crc32(b"b")))
    assert not torch.equal(bits(first), bits(second))


def test_calls_from_several_python_threads_do_not_disturb_each_other(rng: torch.Generator) -> None:
    """The ops hold no state and let go of the interpreter's lock."""
    inputs = [draw("few_values", fewer(50_000) + i, F32, rng) for i in range(4)]
    want = [reference.select_topk(x, 777) for x in inputs]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: select_topk(inputs[i % 4], 777), range(max(8, fewer(64)))))
    for i, top in enumerate(got):
        assert_same_selection(top, want[i % 4], f"call {i}")
