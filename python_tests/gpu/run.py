"""``make test-cuda``: what only a GPU can show. Needs torch with CUDA and the built extension.

``PYTHONPATH=.:python_tests python -m gpu.run [CHECK ...]``

Plain Python, because a machine with a GPU may have no package registry; the contract tests of the
ops are run too where there are pytest and hypothesis. Ends with 0 if everything held.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import piece_ops
from piece_ops import reference
from piece_ops.backends import cuda_full_rows
from piece_ops.backends.cuda_adamw_plan import SparseAdamwPlan

from helpers import on_gpu
from helpers.cases import BF16, F16, F32, F64, SelectCase, select_cases
from helpers.compare import (
    assert_bits_equal,
    assert_same_selection,
    assert_within,
)
from helpers.emulated_worker import CASES, same
from helpers.on_gpu import each, gpu_implementations
from helpers.tolerances import per_sample_squares, per_sample_sums, sum_of_products

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = (
    "accumulate_squares",
    "sparse_adamw",
    "gather",
    "scatter",
    "total",
    "select_topk",
    "sampled_weight_grad",
)
CONTRACTS_OF_TRITON = ("accumulate_per_sample_squares",)
# What their tests say of the CPU alone: its instruction sets, its bits, its modes.
CPU_ONLY = "not instruction_sets and not same_bits and not flush_denormal"
GPU = torch.device("cuda", 0)
SANITIZER_SECONDS = 150


def search_path() -> dict[str, str]:
    """The environment of a process that is to find this package and the tests' helpers."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests")])}


def check_same_bits_as_the_cpu() -> None:
    """Generated cases of every op but select_topk, whose cases follow."""
    implementations = gpu_implementations()
    for kind, make in CASES.items():
        if kind != "select_topk":
            for name, gpu, cpu in make(torch.Generator().manual_seed(6), implementations):
                want = cpu()
                same(gpu(), want, name)


def _select(case: SelectCase, device: str) -> Any:
    def there(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: there(part) for key, part in x.items()}
        return each(x, lambda tensor: tensor.to(device))

    options = dict(case.options)
    if "exclude" in options:
        options["exclude"] = there(options["exclude"])
    return piece_ops.select_topk(there(case.scores), case.k, **options)


def check_selections() -> None:
    """Generated cases: the CPU's selection, whatever the distribution, dtype and options."""
    g = torch.Generator().manual_seed(7)
    for distribution in (
        "gaussian_squared",
        "few_values",
        "with_nan_inf",
        "subnormal",
        "all_equal",
    ):
        for dtype in (F32, BF16, F16, F64, None):
            for case in select_cases(dtype, distribution, g, (1025, 65_537, 2**20 + 3)):
                want, got = _select(case, "cpu"), _select(case, "cuda")
                got = piece_ops.TopK(_home(got.indices), got.threshold, got.ties_kept)
                assert_same_selection(got, want, case.name)


def _home(x: Any) -> Any:
    return {k: v.cpu() for k, v in x.items()} if isinstance(x, dict) else each(x, lambda t: t.cpu())


def check_side_stream() -> None:
    """Every op's work is ordered by the current stream, whichever that is.

    The stream sleeps before it copies an op's input to where the op reads it, so that an op on
    another one runs too early.
    """
    x = torch.rand(200_000)
    there = x.to(GPU)
    want = piece_ops.select_topk(x, 777).indices
    on_gpu.place.sleep = 3_000_000  # 2 ms
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            check_same_bits_as_the_cpu()
            torch.cuda._sleep(on_gpu.place.sleep)
            late = torch.zeros_like(there).copy_(there)
            assert_bits_equal(piece_ops.select_topk(late, 777).indices.cpu(), want)
    finally:
        on_gpu.place.sleep = 0


def check_graph_capture() -> None:
    """Every op with results of fixed size is captured and replayed; bad gradients are reported."""
    weight = torch.zeros(100_000, dtype=BF16, device=GPU)
    index = torch.arange(0, 100_000, 7, device=GPU)
    values, m, v = (torch.zeros(index.numel(), device=GPU) for _ in range(3))
    grad = torch.randn(100_000, device=GPU)
    square = torch.zeros(100_000, device=GPU)

    def step() -> torch.Tensor:
        piece_ops.accumulate_squares_([square], [grad])
        piece_ops.sparse_adamw_(
            [weight], [index], [values], [grad], [m], [v], step=1, lr=1e-2, weight_decay=0.0
        )
        piece_ops.scatter_([weight], [index], piece_ops.gather([weight], [index]))
        return torch.ops.piece_ops.total([square])

    step()  # outside first: indices are checked, the counter of skipped replays is made
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    squared = grad.cpu() * grad.cpu()
    want = squared + squared + squared
    assert_bits_equal(square.cpu(), want, "three accumulations")
    assert float(result) == piece_ops.total(want)
    grad.fill_(float("inf"))
    graph.replay()
    try:
        piece_ops.accumulate_squares_([square], [torch.zeros_like(grad)])
    except ValueError as error:
        assert "1 replays" in str(error), error
    else:
        raise AssertionError("a replay with infinite gradients went unreported")
    assert_bits_equal(square.cpu(), want, "after the refused replay")


def check_second_device() -> None:
    """Every op on a device that is not the current one; the current one stays."""
    if torch.cuda.device_count() < 2:
        print("   one device only: left out")
        return
    on_gpu.place.device = "cuda:1"
    try:
        check_same_bits_as_the_cpu()
    finally:
        on_gpu.place.device = on_gpu.DEVICE
    x = torch.rand(200_000)
    got, want = piece_ops.select_topk(x.to("cuda:1"), 777), piece_ops.select_topk(x, 777)
    assert_bits_equal(got.indices.cpu(), want.indices)
    assert torch.cuda.current_device() == 0


def check_importance() -> None:
    """Maxima left by accumulation and by the per-sample kernel's epilogue change no selection."""
    if not importlib.util.find_spec("triton"):
        print("   no triton here: left out")
        return
    torch.manual_seed(3)
    layers = [torch.nn.Linear(256, 320), torch.nn.GELU(), torch.nn.Linear(320, 256)]
    model = torch.nn.Sequential(*layers, torch.nn.LayerNorm(256)).to(GPU)

    def loss(model: Any, batch: Any) -> Any:
        return (model(batch["x"]) - batch["y"]).square().mean()

    batches = [{name: torch.randn(4, 9, 256, device=GPU) for name in ("x", "y")} for _ in range(3)]
    for method in ("piece-f", "piece-s", "gradient", "snip", "taylor"):
        for per_sample in (True, "loop"):
            importance = piece_ops.Importance(model, method, per_sample=per_sample, loss_fn=loss)
            for batch in batches:
                importance.update(batch)
            maxima = importance._maxima
            assert maxima is not None, f"{method} {per_sample}: no maxima"
            assert maxima._entries or maxima._lists, f"{method} {per_sample}: no maxima"
            got = importance.select(density=0.01)
            importance._maxima = None
            want = importance.select(density=0.01)
            assert got.threshold == want.threshold, f"{method} {per_sample}"
            for name, index in want.indices.items():
                assert_bits_equal(got.indices[name], index, f"{method} {per_sample} {name}")


def check_past_2_32() -> None:
    """4.3e9 elements: positions past 2^32 in every op."""
    n = 2**32 + 12_345
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * n:
        print(f"   {free / 1e9:.0f} GB free, {12 * n / 1e9:.0f} wanted: left out")
        return
    x = torch.zeros(n, dtype=BF16, device=GPU)
    index = torch.tensor([0, 2**31, 2**32, n - 1], device=GPU)
    piece_ops.scatter_(x, index, torch.tensor([1.0, 2.0, 3.0, 4.0], device=GPU))
    assert piece_ops.gather(x, index).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert piece_ops.total(x) == 10.0
    assert piece_ops.select_topk(x, 3).indices.tolist() == [2**31, 2**32, n - 1]
    square = torch.zeros(n, device=GPU)
    piece_ops.accumulate_squares_([square], [x])
    assert piece_ops.gather(square, index).tolist() == [1.0, 4.0, 9.0, 16.0]
    assert piece_ops.total(square) == 30.0
    one = [torch.zeros(4, device=GPU) for _ in range(3)]
    piece_ops.sparse_adamw_(
        [x], [index], [one[0]], [torch.ones(4, device=GPU)], [one[1]], [one[2]], step=1, lr=0.5
    )
    assert_bits_equal(piece_ops.gather(x, index), one[0].to(BF16))


def check_host_time_of_a_plan() -> None:
    """Not a measurement, only that nothing waits: 200 steps are queued behind a long kernel."""
    index = torch.arange(0, 1000, 3, device=GPU)
    lists = [[torch.zeros(index.numel(), device=GPU)] for _ in range(4)]
    plan = SparseAdamwPlan([torch.zeros(1000, device=GPU)], [index], *lists)
    plan.step(1, 1e-3)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    for step in range(2, 202):
        plan.step(step, 1e-3)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    assert seconds < 0.5, f"200 steps took {seconds:.2f} s of host time behind a busy GPU"


def check_training_run() -> None:
    """``piece-ops train --device cuda``: what it changed is in the delta, and nothing else."""
    from transformers import AutoModelForCausalLM

    from piece_ops.cli import main as piece_ops_command

    from helpers import tiny_lm

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny_lm.save_tiny(folder / "base")
        rows = tiny_lm.write_rows(folder / "colours.jsonl", tiny_lm.COLOURS)
        command = ["train", "--model", str(base), "--task", f"colours={rows}", "--device", "cuda"]
        command += ["--method", "piece-g", "--reference-rows", "4", "--reference-tokens", "8"]
        command += ["--density", "0.01", "--steps", "6", "--no-report", "--lr", "0.01"]
        assert piece_ops_command([*command, "--out", str(folder / "run")]) == 0
        delta = piece_ops.Delta.load(folder / "run" / "deltas" / "1-colours.safetensors")
        trained = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
        assert any(
            not torch.equal(delta.values[name], delta.base_values[name]) for name in delta.values
        )
        delta.revert_(trained)
        untouched = AutoModelForCausalLM.from_pretrained(base)
        for (name, got), (_, want) in zip(
            trained.named_parameters(), untouched.named_parameters(), strict=True
        ):
            assert_bits_equal(got.detach(), want.detach(), name)


def check_cupy() -> None:
    """Arrays of CuPy, and of anybody who speaks the CUDA array interface only."""
    if not importlib.util.find_spec("cupy"):
        print("   no cupy here: left out")
        return
    import cupy

    scores = [cupy.random.rand(4096, dtype=cupy.float32) for _ in range(3)]
    top = piece_ops.select_topk(scores, 100)
    assert all(isinstance(index, cupy.ndarray) for index in top.indices)
    want = piece_ops.select_topk([torch.from_numpy(cupy.asnumpy(x)) for x in scores], 100)
    for got, index in zip(top.indices, want.indices, strict=True):
        assert_bits_equal(torch.from_numpy(cupy.asnumpy(got)), index)
    square, grad = cupy.zeros(4096, cupy.float32), scores[0]
    piece_ops.accumulate_squares_(square, grad)
    assert bool((square == grad * grad).all())

    class Spoken:
        def __init__(self, array: cupy.ndarray) -> None:
            self.array = array
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    piece_ops.accumulate_squares_(Spoken(square), Spoken(grad))
    assert bool((square == 2 * (grad * grad)).all())


def check_contract_tests() -> None:
    """python_tests/test_<op>.py with their tensors moved to the GPU."""
    missing = [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]
    if missing:
        print(f"   no {' and '.join(missing)} here: left out")
        return
    command = [sys.executable, "-m", "pytest", "-p", "helpers.on_gpu", "-p", "no:cacheprovider"]
    for names, chosen in ((CONTRACTS, []), (CONTRACTS_OF_TRITON, ["-k", CPU_ONLY])):
        files = [f"python_tests/test_{name}.py" for name in names]
        whole = [*command, "-W", "ignore", *chosen, *files]
        subprocess.run(whole, cwd=ROOT, env=search_path(), check=True)


def check_per_sample_squares() -> None:
    """Real tensor cores and the autotuner, at shapes with many tiles; twice the same bits."""
    if not importlib.util.find_spec("triton"):
        print("   no triton here: left out")
        return
    g = torch.Generator().manual_seed(5)
    # Pointers; descriptors with a rest; descriptors with half tiles.
    for lengths in ([700, 1, 0, 64, 333], [700] * 5, [64] * 5):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        for dtype in (F32, BF16, F16):
            grad = torch.randn(sum(lengths), 1000, generator=g).to(dtype)
            x = torch.randn(sum(lengths), 776, generator=g).to(dtype)
            for has_sums in (False, True):
                check_squares_of(grad, x, offsets, has_sums)


def check_full_rows() -> None:
    """Rows of a sampled gradient by tensor cores, the others with the CPU's bits."""
    g = torch.Generator().manual_seed(6)
    out, width, tokens = 512, 1024, 700
    for dtype in (F32, BF16, F16):
        wanted = torch.rand(out, width, generator=g) < 1e-3
        wanted[::3] = torch.rand(171, width, generator=g) < 0.2
        is_full = wanted.sum(1) >= cuda_full_rows.SHARE[dtype.itemsize] * width
        indices = wanted.view(-1).nonzero().view(-1)
        grad, x = (torch.randn(tokens, n, generator=g).to(dtype) for n in (out, width))
        there = [x.to(GPU) for x in (grad, x, indices)]
        got = piece_ops.sampled_weight_grad(*there).cpu()
        i, j = indices // width, indices % width
        left, right = grad[:, i].double(), x[:, j].double()
        bound = sum_of_products(tokens) * (left * right).abs().sum(0)
        assert_within(got, (left * right).sum(0), bound)
        one_by_one = ~is_full[i]
        want = piece_ops.sampled_weight_grad(grad, x, indices)
        assert_bits_equal(got[one_by_one], want[one_by_one])
        assert not torch.equal(got, want), "no row was computed whole"


def check_squares_of(grad: Tensor, x: Tensor, offsets: Tensor, has_sums: bool) -> None:
    shape, (tokens, samples) = (grad.shape[1], x.shape[1]), (int(offsets.diff().max()), 5)
    size, want, want_sums = (torch.zeros(shape, dtype=F64) for _ in range(3))
    reference.accumulate_per_sample_squares_(want, grad, x, offsets, want_sums)
    reference.accumulate_per_sample_squares_(size, grad.abs(), x.abs(), offsets)
    there = grad.to(GPU), x.to(GPU)
    results = []
    for _ in range(2):
        squares = torch.zeros(shape, device=GPU)
        sums = torch.zeros(shape, device=GPU) if has_sums else None
        piece_ops.accumulate_per_sample_squares_(squares, *there, offsets, sums)
        results.append(squares.cpu())
    assert_bits_equal(results[0], results[1])
    assert_within(results[0], want, per_sample_squares(tokens, samples) * size)
    if sums is not None:  # at most, by Cauchy-Schwarz
        bound = per_sample_sums(tokens, samples) * (samples * size).sqrt()
        assert_within(sums.cpu(), want_sums, bound)
    there[1][len(x) // 2, 5] = float("nan")
    kept = squares.clone()
    try:
        piece_ops.accumulate_per_sample_squares_(squares, *there, offsets)
    except ValueError as error:
        assert "input must be finite, got 1 NaN" in str(error), error
    else:
        raise AssertionError("NaN was taken")
    assert_bits_equal(squares, kept)


def check_compute_sanitizer() -> None:
    """memcheck and racecheck over the generated cases."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        print("   no compute-sanitizer here: left out")
        return
    for kind in ("memcheck", "racecheck"):
        # Only kernels with this in their mangled names: torch's would take minutes.
        command = [tool, f"--tool={kind}", "--error-exitcode=9", "--kernel-name", "kns=piece_ops"]
        command += [sys.executable, "-m", "gpu.run", "same_bits_as_the_cpu"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=search_path(),
                timeout=SANITIZER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            print(f"   {kind}: not done in {SANITIZER_SECONDS} s: left out")
            continue
        if done.returncode and "ERROR SUMMARY" not in done.stdout:
            print(f"   {kind} cannot run here: {done.stdout[-300:]} {done.stderr[-300:]}")
            continue
        assert done.returncode == 0, done.stdout[-3000:]


CHECKS: list[Callable[[], None]] = [
    check_same_bits_as_the_cpu,
    check_selections,
    check_side_stream,
    check_graph_capture,
    check_second_device,
    check_past_2_32,
    check_host_time_of_a_plan,
    check_importance,
    check_per_sample_squares,
    check_full_rows,
    check_training_run,
    check_cupy,
    check_contract_tests,
    check_compute_sanitizer,
]


def main(names: list[str]) -> int:
    if not torch.cuda.is_available():
        print("make test-cuda: wanted a CUDA device, got none")
        return 2
    failed = []
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        if names and name not in names:
            continue
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            check()
        except (Exception, SystemExit) as error:
            failed.append(name)
            traceback.print_exc(file=sys.stdout)
            print(f"   FAILED: {type(error).__name__}: {error}")
        else:
            print(f"   held, {time.perf_counter() - start:.1f} s")
        torch.cuda.empty_cache()
    print(f"failed: {', '.join(failed)}" if failed else "everything held")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
