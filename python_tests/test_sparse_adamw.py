"""sparse_adamw_: AdamW on the float32 masters of selected weights, rounded into dense weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from piece_ops import reference
from piece_ops.functional import sparse_adamw_

from helpers.cases import BF16, EDGE_SIZES, F16, F32, F64, draw, fewer, pick, some_positions
from helpers.compare import assert_all_bits_equal, assert_bits_equal, assert_within
from helpers.tolerances import ADAMW_100_STEPS, ADAMW_TORCH_100_STEPS

WEIGHTS = {"fp32": F32, "bf16": BF16, "fp16": F16}
RATES = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def problem(
    sizes: Sequence[int], dtype: torch.dtype, share: float, g: torch.Generator
) -> dict[str, list[Tensor]]:
    """Weights, positions, masters and zero moments; the masters are not exactly the weights."""
    weights = [torch.randn(n, generator=g).to(dtype) for n in sizes]
    indices = [some_positions(n, share, g) for n in sizes]
    values = [w.float()[i] + 1e-5 for w, i in zip(weights, indices, strict=True)]
    return {
        "weights": weights,
        "indices": indices,
        "values": values,
        "exp_avgs": [torch.zeros_like(v) for v in values],
        "exp_avg_sqs": [torch.zeros_like(v) for v in values],
    }


def copy(state: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {key: [t.clone() for t in tensors] for key, tensors in state.items()}


def assert_states_equal(got: dict[str, list[Tensor]], want: dict[str, list[Tensor]]) -> None:
    for key in want:
        assert_all_bits_equal(got[key], want[key], key)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("grad_dtype", WEIGHTS)
@pytest.mark.parametrize("dense", [False, True], ids=["compact", "dense"])
def test_equals_the_reference(
    dtype: str, grad_dtype: str, dense: bool, rng: torch.Generator
) -> None:
    """Bit for bit, over sizes, shares (none, few, all) and several steps; grads are untouched."""
    for share in (0.0, 0.01, 0.5, 1.0):
        sizes = [*EDGE_SIZES, 20_011] if share == 0.5 else EDGE_SIZES[3:9]
        got = problem(sizes, WEIGHTS[dtype], share, rng)
        want = copy(got)
        for step in (1, 2, 3, 1000):
            counts = [t.numel() for t in got["weights" if dense else "indices"]]
            grads = [draw("normal", n, WEIGHTS[grad_dtype], rng) for n in counts]
            kept = [g.clone() for g in grads]
            rates = pick(rng, (RATES, {"lr": 1e-4, "weight_decay": 0.0}, {"lr": 0.0}, {"lr": 3.0}))
            assert sparse_adamw_(**got, grads=grads, step=step, **rates) is None
            reference.sparse_adamw_(**want, grads=grads, step=step, **rates)
            assert_states_equal(got, want)
            assert_all_bits_equal(grads, kept, "grads")


def test_unselected_weights_keep_their_bits(rng: torch.Generator) -> None:
    for dtype in WEIGHTS.values():
        state = problem([4099], dtype, 0.1, rng)
        before = state["weights"][0].clone()
        for step in range(1, 6):
            grads = [draw("normal", 4099, dtype, rng)]
            sparse_adamw_(**state, grads=grads, step=step, lr=0.1)
        free = torch.ones(4099, dtype=torch.bool)
        free[state["indices"][0]] = False
        assert_bits_equal(state["weights"][0][free], before[free], "unselected")
        assert not torch.equal(state["weights"][0][~free], before[~free])


def test_hundred_steps_equal_torch_adamw(rng: torch.Generator) -> None:
    """With all coordinates selected, and with half of them; also close to float64."""
    for share in (1.0, 0.5):
        state = problem([300, 7, 0, 1025], F32, share, rng)
        state["values"] = [w[i] for w, i in zip(state["weights"], state["indices"], strict=True)]
        theirs = [torch.nn.Parameter(v.clone()) for v in state["values"]]
        optimizer = torch.optim.AdamW(theirs, foreach=False, **RATES)
        exact = [
            (v.double(), torch.zeros_like(v).double(), torch.zeros_like(v).double())
            for v in state["values"]
        ]
        for step in range(1, 101):
            grads = [torch.randn(p.shape, generator=rng) + 0.3 for p in theirs]
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
            sparse_adamw_(**state, grads=grads, step=step, **RATES)
            exact = [
                reference.adamw_step(*pmv, g, step=step, dtype=F64, **RATES)
                for pmv, g in zip(exact, grads, strict=True)
            ]
        for value, other, (p, _, _) in zip(state["values"], theirs, exact, strict=True):
            bound = 1 + p.abs()
            assert_within(value, p, ADAMW_100_STEPS * bound, "against float64")
            assert_within(value, other.detach(), ADAMW_TORCH_100_STEPS * bound, "against torch")


def test_rounding_of_every_bf16_neighbour() -> None:
    """lr = 0 leaves the master as it is: the weight must be it, rounded to nearest even."""
    upper = torch.arange(2**16, dtype=torch.int64)
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = (upper * 65536 + lower) & 0xFFFFFFFF
        masters = torch.from_numpy(bits.numpy().astype(np.uint32).view(np.float32).copy())
        masters = masters[torch.isfinite(masters)]
        for dtype in (BF16, F16):
            weights = torch.zeros(masters.numel(), dtype=dtype)
            sparse_adamw_(
                weights,
                torch.arange(masters.numel()),
                masters.clone(),
                torch.zeros(masters.numel()),
                torch.zeros(masters.numel()),
                torch.zeros(masters.numel()),
                step=1,
                lr=0.0,
            )
            # p * 1 - 0 * (0 / eps): the sign of a zero survives.
            assert_bits_equal(weights, masters.to(dtype), f"{dtype} lower half {lower:#06x}")


@pytest.mark.parametrize("pieces", [0, 1, 300])
def test_many_tensors(pieces: int, rng: torch.Generator) -> None:
    got = problem([n % 50 for n in range(pieces)], BF16, 0.3, rng)
    want = copy(got)
    grads = [torch.randn(i.numel(), generator=rng) for i in got["indices"]]
    sparse_adamw_(**got, grads=grads, step=1, **RATES)
    reference.sparse_adamw_(**want, grads=grads, step=1, **RATES)
    assert_states_equal(got, want)


def test_ten_thousand_tiny_tensors(rng: torch.Generator) -> None:
    got = problem([n % 4 for n in range(fewer(10_000))], F32, 0.5, rng)
    want = copy(got)
    grads = [torch.randn(w.numel(), generator=rng) for w in got["weights"]]
    sparse_adamw_(**got, grads=grads, step=7, **RATES)
    reference.sparse_adamw_(**want, grads=grads, step=7, **RATES)
    assert_states_equal(got, want)


def test_same_bits_for_every_thread_count() -> None:
    g = torch.Generator().manual_seed(9)
    start = problem([fewer(2**20 + 3), 1000, fewer(2**18)], BF16, 0.3, g)
    grads = [torch.randn(i.numel(), generator=g) for i in start["indices"]]
    want = copy(start)
    reference.sparse_adamw_(**want, grads=grads, step=1, **RATES)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        got = copy(start)
        sparse_adamw_(**got, grads=grads, step=1, **RATES)
        assert_states_equal(got, want)


def test_flush_denormal_mode_changes_nothing(rng: torch.Generator) -> None:
    for dtype in WEIGHTS.values():
        got = problem([3000], dtype, 1.0, rng)
        got["values"] = [draw("subnormal_mixed", 3000, F32, rng)]
        grads = [draw("subnormal_mixed", 3000, F32, rng)]
        want = copy(got)
        reference.sparse_adamw_(**want, grads=grads, step=1, lr=1e-38, weight_decay=0.5)
        assert torch.set_flush_denormal(True)
        sparse_adamw_(**got, grads=grads, step=1, lr=1e-38, weight_decay=0.5)
        torch.set_flush_denormal(False)
        assert_states_equal(got, want)


def test_shapes_structures_and_leaves(rng: torch.Generator) -> None:
    """A leaf that requires grad, of any rank, by name, next to a scalar; a view with an offset."""
    store = torch.randn(1 + 24, generator=rng)
    kept = store.clone()
    weights = {
        "conv": torch.nn.Parameter(torch.randn(2, 3, 2, generator=rng).to(BF16)),
        "scale": torch.nn.Parameter(torch.tensor(0.5)),
        "view": store[1:].view(4, 6),
    }
    indices = {
        "conv": torch.tensor([0, 11]),
        "scale": torch.tensor([0]),
        "view": torch.tensor([23]),
    }
    values = {key: w.detach().flatten()[indices[key]].float() for key, w in weights.items()}
    values = {key: torch.nn.Parameter(v) for key, v in values.items()}
    grads = {key: torch.ones(w.shape, dtype=w.dtype) for key, w in weights.items()}
    m = {key: torch.zeros(v.shape) for key, v in values.items()}
    v = {key: torch.zeros(v.shape) for key, v in values.items()}
    sparse_adamw_(weights, indices, values, grads, m, v, step=1, lr=0.25, weight_decay=0.0)
    assert float(weights["scale"].detach()) == float(values["scale"].detach())
    assert abs(float(weights["scale"].detach()) - 0.25) < 1e-6  # the first step is lr * sign(g)
    assert_bits_equal(store[:24], kept[:24], "outside the selection")
    assert weights["conv"].requires_grad and weights["conv"].grad is None


def test_numpy_arrays(rng: torch.Generator) -> None:
    w = np.ones(5, np.float32)
    p, m, v = np.ones(2, np.float32), np.zeros(2, np.float32), np.zeros(2, np.float32)
    sparse_adamw_(w, np.array([1, 3]), p, np.ones(2, np.float32), m, v, step=1, lr=0.5)
    assert w.tolist() == [1.0, float(p[0]), 1.0, float(p[1]), 1.0] and p[0] < 0.6


NAN = float("nan")


def arguments(**changes: Any) -> dict[str, Any]:
    base = {
        "weights": torch.zeros(2, 3),
        "indices": torch.tensor([1, 4]),
        "values": torch.zeros(2),
        "grads": torch.ones(2),
        "exp_avgs": torch.zeros(2),
        "exp_avg_sqs": torch.zeros(2),
        "step": 1,
        "lr": 0.1,
    }
    return {**base, **changes}


def read_only() -> Any:
    array = np.zeros(2, np.float32)
    array.flags.writeable = False
    return array


ARRAYS = {
    key: value.numpy() if isinstance(value, Tensor) else value for key, value in arguments().items()
}
I64 = torch.tensor
BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "step 0": (arguments(step=0), ValueError, ["step", "0"]),
    "step a float": (arguments(step=1.5), TypeError, ["step", "float"]),
    "lr negative": (arguments(lr=-0.1), ValueError, ["lr", "-0.1"]),
    "lr NaN": (arguments(lr=NAN), ValueError, ["lr", "nan"]),
    "beta1": (arguments(betas=(1.0, 0.9)), ValueError, ["beta", "1.0"]),
    "beta2": (arguments(betas=(0.9, -0.1)), ValueError, ["beta", "-0.1"]),
    "eps": (arguments(eps=-1e-8), ValueError, ["eps", "-1e-08"]),
    "weight_decay": (arguments(weight_decay=-1.0), ValueError, ["weight_decay", "-1.0"]),
    "index past the end": (arguments(indices=I64([1, 6])), ValueError, ["indices", "6"]),
    "index negative": (arguments(indices=I64([-1, 4])), ValueError, ["indices", "-1"]),
    "index twice": (arguments(indices=I64([4, 4])), ValueError, ["indices", "increasing"]),
    "index unsorted": (arguments(indices=I64([4, 1])), ValueError, ["indices", "increasing"]),
    "int32 indices": (arguments(indices=I64([1, 4]).int()), TypeError, ["int64", "int32"]),
    "values too long": (arguments(values=torch.zeros(3)), ValueError, ["values", "2", "3"]),
    "values in bf16": (
        arguments(values=torch.zeros(2, dtype=BF16)),
        TypeError,
        ["values", "float32", "bfloat16"],
    ),
    "grads of another size": (arguments(grads=torch.ones(3)), ValueError, ["grads", "3"]),
    "grads of float64": (arguments(grads=torch.ones(2).double()), TypeError, ["grads", "float64"]),
    "exp_avgs too short": (arguments(exp_avgs=torch.zeros(1)), ValueError, ["exp_avgs", "1"]),
    "exp_avg_sqs of float64": (
        arguments(exp_avg_sqs=torch.zeros(2).double()),
        TypeError,
        ["exp_avg_sqs", "float64"],
    ),
    "weights of float64": (
        arguments(weights=torch.zeros(2, 3).double()),
        TypeError,
        ["weights", "float64"],
    ),
    "weights not contiguous": (
        arguments(weights=torch.zeros(3, 2).t()),
        ValueError,
        ["weights", "contiguous"],
    ),
    "grads not contiguous": (
        arguments(grads=torch.ones(4)[::2]),
        ValueError,
        ["grads", "contiguous()"],
    ),
    "fewer tensors": (
        {
            k: [v, v] if isinstance(v, Tensor) and k != "values" else v
            for k, v in arguments().items()
        }
        | {"values": [torch.zeros(2)]},
        ValueError,
        ["values", "1", "2"],
    ),
    "read-only moments": (
        {**ARRAYS, "exp_avgs": read_only()},
        ValueError,
        ["exp_avgs", "read-only"],
    ),
    "not a tensor": (arguments(grads="g"), TypeError, ["grads", "str"]),
    "missing": (arguments(grads=None), (TypeError, ValueError), ["grads"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    """A clear message, and nothing is written."""
    given, error, words = BAD[name]
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    kept = {key: value.clone() for key, value in tensors.items()}
    with pytest.raises(error) as caught:
        sparse_adamw_(**given)
    text = str(caught.value)
    assert text.startswith("piece_ops.sparse_adamw_: "), text
    for word in [*words, "got"]:
        assert word in text, f"{word!r} is not in: {text}"
    assert_all_bits_equal(tensors, kept, "arguments")
