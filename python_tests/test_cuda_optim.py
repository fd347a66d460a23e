"""SparseAdamW over the plan of the CUDA backend, on emulated kernels: the same bits, one launch."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import piece_ops.optim as optim_module
from piece_ops import PieceModel, SparseAdamW, estimate
from piece_ops.backends import ADAMW_STEPS

from helpers.compare import assert_all_bits_equal
from helpers.emulated import build, emulation, load

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
)
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return load(build("plain"))


@pytest.fixture
def planned(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Only the optimizer's call goes through emulated kernels; everything else stays the CPU's."""
    monkeypatch.setattr(optim_module, "ADAMW_STEPS", {"cpu": ADAMW_STEPS["cuda"]})
    with emulation(extension):
        yield extension


def wrapped() -> PieceModel:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)).to(torch.bfloat16)
    return PieceModel(model, estimate(model, method="magnitude", density=0.1))


def train(model: PieceModel, optimizer: SparseAdamW, *steps: int, keep: bool = True) -> None:
    for step in steps:
        optimizer.zero_grad(set_to_none=not keep)
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
        model(x.to(torch.bfloat16)).square().mean().backward()
        optimizer.step()


def tensors(model: PieceModel, optimizer: SparseAdamW) -> list[torch.Tensor]:
    state = [x for s in optimizer.state.values() for x in (s["exp_avg"], s["exp_avg_sq"])]
    return [*model.state_dict().values(), *model.values.parameters(), *state]


def expected(*steps: int) -> list[torch.Tensor]:
    """What the CPU backend makes of the same steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim_module, "ADAMW_STEPS", {})
        model = wrapped()
        optimizer = SparseAdamW(model.parameters(), **SETTINGS)
        train(model, optimizer, *steps)
    return tensors(model, optimizer)


@pytest.mark.parametrize("keep", [True, False], ids=["same gradients", "new gradients"])
def test_a_step_is_one_launch_with_the_same_bits(planned: ModuleType, keep: bool) -> None:
    model = wrapped()
    optimizer = SparseAdamW(model.parameters(), **SETTINGS)
    launches = []
    for step in range(4):
        before = planned.launch_count()
        train(model, optimizer, step, keep=keep)
        launches.append(planned.launch_count() - before)
    assert launches[0] == 4  # the table, the look at the indices (and its word), the step
    assert all(n == 1 or (n == 2 and not keep) for n in launches[1:]), launches
    assert_all_bits_equal(tensors(model, optimizer), expected(*range(4)))


def test_moved_tensors_are_laid_out_again(planned: ModuleType) -> None:
    model = wrapped()
    optimizer = SparseAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, 0)
    held = list(model.parameters())  # at their old addresses until the end
    for values in model.values.parameters():
        values.data = values.data.clone()
    for weight in (m.weight for m in model.modules() if isinstance(m, nn.Linear)):
        held.append(weight.data)
        weight.data = weight.data.clone()
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    train(model, optimizer, 2)
    assert_all_bits_equal(tensors(model, optimizer), expected(0, 1, 2))


def test_a_copy_steps_on_tensors_of_its_own(planned: ModuleType) -> None:
    model = wrapped()
    optimizer = SparseAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, 0)
    other_model, other = copy.deepcopy((model, optimizer))
    train(other_model, other, 1)
    assert_all_bits_equal(tensors(model, optimizer), expected(0))
    assert_all_bits_equal(tensors(other_model, other), expected(0, 1))


def test_groups_and_values_left_out(planned: ModuleType) -> None:
    """A plan each; values without a gradient change which tensors a group steps on."""
    results = []
    for steps in ({"cpu": ADAMW_STEPS["cuda"]}, {}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim_module, "ADAMW_STEPS", steps)
            model = wrapped()
            first, *others = model.values.parameters()
            groups = [{"params": [first], "lr": 0.5}, {"params": others}]
            optimizer = SparseAdamW(groups, **SETTINGS)
            train(model, optimizer, 0, 1)
            others[0].requires_grad_(False)
            train(model, optimizer, 2)
            others[0].requires_grad_(True)
            train(model, optimizer, 3, 4)
            results.append(tensors(model, optimizer))
    assert_all_bits_equal(*results)


def test_what_does_not_fit_is_refused_after_a_plan_too(planned: ModuleType) -> None:
    model = wrapped()
    optimizer = SparseAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, 0)
    before = [x.clone() for x in tensors(model, optimizer)]
    values = next(model.values.parameters())
    kept, index = values.grad, values.piece_target.indices  # type: ignore[attr-defined]
    values.grad = torch.ones(2 * values.numel())[::2]
    with pytest.raises(ValueError, match=r"grads\[0\] must be contiguous"):
        optimizer.step()
    values.grad = kept
    last = int(index[-1])
    index[-1] = -1
    with pytest.raises(ValueError, match=r"indices\[0\] must be in 0"):
        optimizer.step()
    index[-1] = last
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step()
    assert_all_bits_equal(tensors(model, optimizer), before)


def test_written_weights_are_noticed_by_autograd(planned: ModuleType) -> None:
    """The versions of what a plan writes are bumped, like an op's."""
    model = wrapped()
    optimizer = SparseAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, 0)
    values = next(model.values.parameters())
    weight = values.piece_target.weight  # type: ignore[attr-defined]
    versions = values._version, weight._version
    optimizer.step()
    assert (values._version, weight._version) == (versions[0] + 1, versions[1] + 1)


def test_indices_without_a_version_are_checked_at_every_step(planned: ModuleType) -> None:
    with torch.inference_mode():
        index = torch.tensor([1, 3])
    lists = [[torch.zeros(8)], [index], [torch.zeros(2)], [torch.ones(2)]]
    lists += [[torch.zeros(2)], [torch.zeros(2)]]
    steps = ADAMW_STEPS["cuda"]()
    for step in (1, 2):
        before = planned.launch_count()
        steps(*lists, step=step, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        assert planned.launch_count() - before >= 2
