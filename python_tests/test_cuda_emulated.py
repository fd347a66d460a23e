"""The CUDA backend on emulated kernels: the CPU's bits, tables, checks and captures.

Nothing here needs a GPU or nvcc. What blocks do at the same time is not emulated, nor is speed.
Contract tests and sanitizers: test_cuda_contracts.py.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from piece_ops import _schema
from piece_ops.backends import _cuda_runtime, cuda, cuda_full_rows, cuda_select_topk
from piece_ops.backends._lists import matrix
from piece_ops.backends.cuda_adamw_plan import SparseAdamwPlan

from helpers.cases import BF16, DTYPES, F16, F32, F64, draw, pick, some_positions
from helpers.compare import assert_all_bits_equal, assert_bits_equal
from helpers.emulated import EmulatedRuntime, build, emulation, load

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
)

OPS = torch.ops.piece_ops
MIXED = (F32, BF16, F16)
# Tiles of 1024 slots and 4096 elements, chunks of 32, vectors of 8: one off each, and empty ones.
SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 1023, 1024, 1025, 4095, 4096, 4097, 20_011)


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return load(build("plain"))


@pytest.fixture(params=["in order", "shuffled"])
def emulated(extension: ModuleType, request: pytest.FixtureRequest) -> Iterator[EmulatedRuntime]:
    """Blocks and threads in rising order on a chip of 6 blocks, and shuffled on one of 5."""
    shuffled = request.param == "shuffled"
    extension.set_seed(17 if shuffled else 0)
    extension.set_device(*((5, 1) if shuffled else (3, 2)))
    with emulation(extension) as runtime:
        yield runtime


# ---- the same bits as the CPU --------------------------------------------------------------------


def views(dtypes: Any, g: torch.Generator, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """Tensors of which half start at an address that is no multiple of 16."""
    found = []
    for n in sizes:
        offset = pick(g, (0, 0, 1, 2, 3, 5))
        found.append(draw("normal", n + offset, pick(g, dtypes), g)[offset:])
    return found


def shifted(like: list[Tensor], offset: int, g: torch.Generator) -> list[Tensor]:
    """float32 tensors of the same sizes that start `offset` elements into their memory."""
    return [torch.rand(x.numel() + offset, generator=g)[offset:] for x in like]


def copied(tensors: list[Tensor]) -> list[Tensor]:
    """Copies at the same offset, so that addresses align as the originals'."""
    found = []
    for x in tensors:
        whole = torch.empty(x.numel() + x.storage_offset(), dtype=x.dtype)
        whole[x.storage_offset() :] = x
        found.append(whole[x.storage_offset() :])
    return found


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_accumulate_squares(emulated: Any, offset: int, rng: torch.Generator) -> None:
    grads = views(MIXED, rng)
    squares, sums = shifted(grads, offset, rng), shifted(grads, offset, rng)
    for has_squares, has_sums in ((True, True), (True, False), (False, True)):
        want, got = [copied(squares), copied(sums)], [copied(squares), copied(sums)]
        for op, (a, b) in ((OPS.accumulate_squares_, want), (cuda.accumulate_squares_, got)):
            op(a if has_squares else [], grads, b if has_sums else [], 0.3)
        assert_all_bits_equal(got[0], want[0], "square_sums")
        assert_all_bits_equal(got[1], want[1], "sums")


@pytest.mark.parametrize("score", ["plain", "piece-s", "piece-g", "magnitude", "snip", "taylor"])
@pytest.mark.parametrize("offset", [0, 1])
def test_maxima_of_chunks(emulated: Any, score: str, offset: int, rng: torch.Generator) -> None:
    """The largest score of every 32 elements, of the accumulators as they are afterwards."""
    grads = views(MIXED, rng)
    squares, sums = shifted(grads, offset, rng), shifted(grads, offset, rng)
    sums[-1][77] = float("nan")
    second = [draw("normal", x.numel(), pick(rng, MIXED), rng) for x in grads]
    external = score in ("piece-g", "snip", "taylor")
    want_squares, want_sums = copied(squares), copied(sums)
    OPS.accumulate_squares_(want_squares, grads, want_sums, 0.5)
    maxima = [torch.full(((x.numel() + 31) // 32,), -7.0) for x in grads]
    before = maxima[-1]._version
    cuda.accumulate_squares_and_maxima_(
        squares, grads, sums, 0.5, maxima, score, second if external else [], 0.25
    )
    assert maxima[-1]._version == before + 1
    assert_all_bits_equal([*squares, *sums], [*want_squares, *want_sums], "accumulators")
    for t, got in enumerate(maxima):
        x = scores_of(score, want_squares[t], want_sums[t], second[t])
        padded = torch.full((got.numel() * 32,), -float("inf"))
        padded[: x.numel()] = x
        want = padded.view(-1, 32).amax(dim=1) + 0.0  # -0 counts as +0
        assert torch.equal(got.isnan(), want.isnan()), f"{score} tensor {t}: NaN"
        assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0)), f"{score} tensor {t}"


def scores_of(score: str, squares: Tensor, sums: Tensor, second: Tensor) -> Tensor:
    other = second.float()
    return {
        "plain": lambda: squares,
        # Through float64: torch's float32 root may err by one unit in the last place.
        "piece-s": lambda: sums.abs() / (squares + 0.25).double().sqrt().float(),
        "piece-g": lambda: sums.abs() / (other + 0.25),
        "magnitude": lambda: sums.abs(),
        "snip": lambda: (sums * other).abs(),
        "taylor": lambda: squares * (other * other),
    }[score]()


@pytest.mark.parametrize("is_dense", [False, True], ids=["compact", "dense"])
def test_sparse_adamw(emulated: Any, is_dense: bool, rng: torch.Generator) -> None:
    weights = views(MIXED, rng)
    indices = [some_positions(w.numel(), pick(rng, (0.0, 0.02, 0.5, 1.0)), rng) for w in weights]
    like = weights if is_dense else indices
    grads = [draw("normal", x.numel(), pick(rng, MIXED), rng) for x in like]
    start = [weights, *(shifted(indices, 1, rng) for _ in range(3))]
    want, got = ([copied(x) for x in start] for _ in range(2))
    for step in (1, 2, 3):
        numbers = (step, 1e-2, 0.9, 0.999, 1e-8, 0.1)
        OPS.sparse_adamw_(want[0], indices, want[1], grads, want[2], want[3], *numbers)
        cuda.sparse_adamw_(got[0], indices, got[1], grads, got[2], got[3], *numbers)
    for what, a, b in zip(("weights", "values", "m", "v"), got, want, strict=True):
        assert_all_bits_equal(a, b, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_scatter(emulated: Any, dtype: str, rng: torch.Generator) -> None:
    dense = views((DTYPES[dtype],), rng)
    indices = [some_positions(x.numel(), 0.3, rng) for x in dense]
    for wanted in (None, F32) if dtype != "fp64" else (None,):
        got, want = cuda.gather(dense, indices, wanted), OPS.gather(dense, indices, wanted)
        assert_all_bits_equal(got, want, f"gather {wanted}")
        values = [v.flip(0).contiguous() for v in want]
        a, b = copied(dense), copied(dense)
        cuda.scatter_(a, indices, values)
        OPS.scatter_(b, indices, values)
        assert_all_bits_equal(a, b, f"scatter_ {wanted}")


def test_total(emulated: Any, rng: torch.Generator) -> None:
    for sizes in (SIZES, (65_535, 0, 65_536, 65_537), (200_000,), (1,) * 2100):
        x = views((*MIXED, F64), rng, sizes)
        assert_bits_equal(cuda.total(x), OPS.total(x), f"{len(sizes)} tensors")


def test_sampled_weight_grad(
    emulated: Any, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of tokens at once, and two at a time."""
    for dtypes in ((F32, F32), (BF16, BF16), (F16, BF16)):
        g = torch.randn(1100, 90, generator=rng).to(dtypes[0])
        x = torch.randn(1100, 50, generator=rng).to(dtypes[1])
        indices = some_positions(4500, pick(rng, (0.01, 0.1)), rng)
        want = OPS.sampled_weight_grad(g, x, indices)
        assert_bits_equal(cuda.sampled_weight_grad(g, x, indices), want, f"{dtypes}")
        two = 2 * emulated.extension.cuda_sampled_weight_grad_bytes(matrix(x), indices.numel())
        monkeypatch.setattr(cuda, "SAMPLED_SCRATCH_BYTES", two + 1)
        assert_bits_equal(cuda.sampled_weight_grad(g, x, indices), want, f"{dtypes}, in steps")


def test_sampled_weight_grad_in_chunks(
    emulated: Any, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of rows that end where a chunk of indices does, one off it, or hold several chunks.

    A window is 32 rows of 16-bit elements, 16 of 32-bit ones; a chunk 16 to 256 indices.
    """
    monkeypatch.setattr(cuda_full_rows, "LEAST", 1 << 62)
    tokens, out = 300, 150
    for width, dtype in ((4, BF16), (8, BF16), (16, F32), (41, BF16), (64, F16)):
        g, x = (torch.randn(tokens, n, generator=rng).to(dtype) for n in (out, width))
        everything = OPS.sampled_weight_grad(g, x, torch.arange(out * width))
        for start, stop, step in (
            (0, out * width, 1),
            (1, out * width, 1),
            (33 * width - 1, out * width, 1),
            (0, out * width - 7, 3),
            (out * width - 40, out * width, 1),
            (5, out * width, 16 * width + 1),  # a window, an index
        ):
            indices = torch.arange(start, stop, step)
            got = cuda.sampled_weight_grad(g, x, indices)
            assert_bits_equal(got, everything[indices], f"{width} {dtype} {start} {stop} {step}")


def test_ten_thousand_tensors(emulated: Any, rng: torch.Generator) -> None:
    grads = [torch.randn(n % 5, generator=rng) for n in range(10_000)]
    want, got = ([torch.zeros(g.numel()) for g in grads] for _ in range(2))
    OPS.accumulate_squares_(want, grads, [], 1.0)
    cuda.accumulate_squares_(got, grads, [], 1.0)
    assert_all_bits_equal(got, want)
    assert_bits_equal(cuda.total(grads), OPS.total(grads))


# ---- tables, checks, capture ---------------------------------------------------------------------


def test_one_launch_and_a_kept_table(emulated: Any, extension: ModuleType) -> None:
    """291 tensors: four launches with the table and the look at the indices, then one."""
    weights = [torch.zeros(64, dtype=BF16) for _ in range(291)]
    indices = [torch.arange(0, 64, 3) for _ in weights]
    lists = [[torch.ones(22) for _ in weights] for _ in range(4)]
    counts = []
    for step in (1, 2, 3):
        before = extension.launch_count()
        cuda.sparse_adamw_(
            weights, indices, *lists[:2], *lists[2:], step, 1e-3, 0.9, 0.999, 1e-8, 0.0
        )
        counts.append(extension.launch_count() - before)
    assert counts == [4, 1, 1], counts
    plan = SparseAdamwPlan(weights, indices, *lists)
    before = extension.launch_count()
    plan.step(4, 1e-3)
    assert extension.launch_count() - before == 1


def test_indices_are_checked_again_when_they_change(emulated: Any) -> None:
    source, index = torch.arange(10.0), torch.tensor([1, 2, 9])
    assert cuda.gather([source], [index])[0].tolist() == [1.0, 2.0, 9.0]
    index[2] = 10
    with pytest.raises(ValueError, match=r"indices\[0\] must be in 0\.\.9, got 10 at slot 2"):
        cuda.gather([source], [index])
    index[2] = 2
    wanted = r"indices\[0\] must be strictly increasing, got 2 after 2 at slot 2"
    with pytest.raises(ValueError, match=wanted):
        cuda.gather([source], [index])
    # A new tensor at an old address is another tensor.
    for last in (9, 11):
        fresh = [torch.tensor([0, last])]
        if last == 9:
            cuda.gather([source], fresh)
        else:
            with pytest.raises(ValueError, match="got 11 at slot 1"):
                cuda.gather([source], fresh)
        del fresh


def test_the_first_wrong_index_is_named(emulated: Any) -> None:
    """In the caller's order, whatever block meets it first; nothing is written."""
    targets = [torch.zeros(5000) for _ in range(3)]
    indices = [torch.arange(5000) for _ in range(3)]
    indices[1][3000:] -= 1
    indices[2][7] = -1
    with pytest.raises(ValueError, match=r"indices\[1\] .* got 2999 after 2999 at slot 3000"):
        cuda.scatter_(targets, indices, [torch.ones(5000) for _ in range(3)])
    assert not any(bool(t.any()) for t in targets)


def test_capture(emulated: EmulatedRuntime) -> None:
    """Inside a graph nothing waits: unknown indices are refused, bad gradients reported later."""
    square, good, bad = torch.zeros(40), torch.ones(40), torch.full((40,), float("nan"))
    emulated.captures = True
    with pytest.raises(RuntimeError, match="call it once outside"):
        cuda.accumulate_squares_([square], [good], [], 1.0)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        cuda.gather([good], [torch.tensor([0])])
    with pytest.raises(RuntimeError, match=r"select_topk: must be called outside a CUDA graph's"):
        cuda_select_topk.select_topk([good], [], [3], [], "plain", 0.0, 0, "raise", "auto")
    emulated.captures = False
    index = torch.tensor([3])
    cuda.gather([good], [index])
    cuda.accumulate_squares_([square], [good], [], 1.0)
    emulated.captures = True
    cuda.gather([good], [index])
    cuda.accumulate_squares_([square], [bad], [], 1.0)
    cuda.accumulate_squares_([square], [good], [], 1.0)
    assert square.tolist() == [2.0] * 40
    emulated.captures = False
    with pytest.raises(ValueError, match="in 1 replays of a captured CUDA graph"):
        cuda.accumulate_squares_([square], [good], [], 1.0)
    cuda.accumulate_squares_([square], [good], [], 1.0)
    assert square.tolist() == [3.0] * 40


def test_tables_are_not_kept_without_end(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes: the last ones stay, and one that is too large alone stays until the next."""
    tables = _cuda_runtime._tables
    x = torch.ones(4)
    cuda.total([x])
    one = tables.n_bytes
    assert one > 0
    monkeypatch.setattr(_cuda_runtime, "KEPT_BYTES", 20 * one)
    for n in range(1, 12):
        cuda.total([x] * n)
        assert tables.n_bytes <= 20 * one
    assert len(tables._tables) > 1
    assert tables.n_bytes == sum(kept.handle.n_bytes for kept in tables._tables.values())
    cuda.total([x] * 1000)
    assert len(tables._tables) == 1


def test_tables_are_made_by_several_threads_at_once(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autograd's threads do; few fit, so that they are dropped and made all the time."""
    place = _cuda_runtime.place_of("total", torch.ones(1))

    class Handle:  # the emulation itself is for one thread
        def __init__(self, count: int) -> None:
            self.n_bytes = 8 * count

        def write(self, *_: int) -> None:
            pass

    monkeypatch.setattr(_cuda_runtime, "KEPT_BYTES", 2000)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(300):
                count = 1 + (n * 7 + seed) % 23
                table = _cuda_runtime.table_of(place, lambda sizes: Handle(len(sizes)), [4] * count)
                assert table.handle.n_bytes == 8 * count
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors, errors[0]
    tables = _cuda_runtime._tables
    assert tables.n_bytes == sum(kept.handle.n_bytes for kept in tables._tables.values())


@pytest.mark.parametrize("score", ["bogus", "random"])
def test_an_unknown_score_of_maxima(emulated: Any, score: str) -> None:
    x = torch.ones(40)
    with pytest.raises(ValueError, match=rf"accumulate_squares_: score must be .*{score}"):
        cuda.accumulate_squares_and_maxima_([x], [x], [], 1.0, [torch.ones(2)], score)
    assert x.tolist() == [1.0] * 40


@pytest.mark.parametrize(
    ("architectures", "capabilities"),
    [
        ("80-real,90-real,100-real,120", {80, 86, 89, 90, 100, 103, 120, 121, 130}),
        ("90-real", {90}),
        ("90-virtual", {90, 100, 103, 120, 121, 130}),
        ("90a-real", {90}),
        ("100f", {100, 103}),
        ("native", set()),
        ("", set()),
    ],
)
def test_what_runs_where(extension: ModuleType, architectures: str, capabilities: set[int]) -> None:
    known = (75, 80, 86, 89, 90, 100, 103, 120, 121, 130)
    assert {c for c in known if extension.runs_on(architectures, c)} == capabilities


def test_every_op_has_a_cuda_implementation() -> None:
    for op in _schema.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"piece_ops::{op}", "CUDA"), op
