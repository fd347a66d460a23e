"""TaskSwitch: many tasks on one live model, one pass a switch; what others did to it is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piece_ops import PieceModel, TaskSwitch
from piece_ops.backends import KEPT_SCATTERS
from piece_ops.backends.cpu_switch import CpuScatters
from piece_ops.functional import scatter_

from helpers.cases import DTYPES, EDGE_SIZES, draw, some_positions
from helpers.compare import assert_all_bits_equal
from helpers.deltas import same, select, snapshot, train, two_tasks
from helpers.tiny_models import llama


@pytest.mark.parametrize("kept", [True, False], ids=["one_pass", "any_device"])
@pytest.mark.parametrize("shared", [True, False])
def test_switching_between_tasks_on_a_live_model(
    shared: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the calls that a device without kept scatters takes."""
    if not kept:
        monkeypatch.delitem(KEPT_SCATTERS, "cpu")
    model, first, second, base = two_tasks(shared)
    states = {None: base}
    for task, delta in (("one", first), ("two", second)):
        with delta.applied(model):
            states[task] = snapshot(model)
    tasks = TaskSwitch(model, {"one": first, "two": second})
    for task in ("one", "two", "two", "one", None, "two", None, None):
        tasks.switch_(task)
        assert tasks.active == task and same(model, states[task])
    with pytest.raises(KeyError, match=r"one of \['one', 'two'\] or None, got 'three'"):
        tasks.switch_("three")


def test_a_switch_checks_its_deltas_when_made() -> None:
    model, first, _, _ = two_tasks(shared=False)
    with first.applied(model), pytest.raises(ValueError, match="applied already"):
        TaskSwitch(model, {"one": first})
    with first.applied(model):
        child = train(model, seed=4, density=1e-4, parent=first)
        child.revert_(model)
    with pytest.raises(ValueError, match=r"fingerprint|base values"):
        TaskSwitch(model, {"one": first, "child": child})
    with pytest.raises(ValueError, match=r"parameters .* got 1 that differ"):
        TaskSwitch(model, {"one": train(llama(tied=True))})


def test_a_switch_notices_what_others_did_to_the_weights() -> None:
    model, first, second, base = two_tasks(shared=False)
    tasks = TaskSwitch(model, {"one": first, "two": second})
    tasks.switch_("one")
    name, place = "lm_head.weight", int(first.indices["lm_head.weight"][0])
    with torch.no_grad():
        model.lm_head.weight.view(-1)[place] += 1.0
    kept = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"switch_: .* changed values .*in 1 tensors \({name!r}: 1 of"
    ):
        tasks.switch_("two")
    assert same(model, kept) and tasks.active == "one"
    with torch.no_grad():
        model.lm_head.weight.view(-1)[place] -= 1.0
        model.lm_head.weight.view(-1)[place] = first.values[name][0]
    tasks.switch_("two")  # written, but the bits are right
    tasks.switch_(None)
    assert same(model, base)
    wrapped = PieceModel(model, select(model))
    with pytest.raises(ValueError, match="must keep the parameters"):
        tasks.switch_("one")
    wrapped.unload()
    model.to(torch.float64)
    with pytest.raises(ValueError, match="must keep the parameters"):
        tasks.switch_("one")
    model.to(torch.float32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="must keep the parameters"):
        tasks.switch_("one")


def test_bits_that_the_next_task_would_replace_are_compared_when_somebody_wrote() -> None:
    """At a coordinate of the coming task alone: from another task, and from the base."""
    model, first, second, base = two_tasks(shared=False)
    tasks = TaskSwitch(model, {"one": first, "two": second})
    name = "lm_head.weight"
    free = second.indices[name][~torch.isin(second.indices[name], first.indices[name])]
    for active in ("one", None):
        tasks.switch_(active)
        with torch.no_grad():
            model.lm_head.weight.view(-1)[free[0]] += 1.0
        kept = snapshot(model)
        with pytest.raises(ValueError, match=r"switch_: .* base values .*1 of .* coordinates"):
            tasks.switch_("two")
        assert same(model, kept) and tasks.active == active
        with torch.no_grad():
            model.lm_head.weight.view(-1)[free[0]] = second.base_values[name][
                second.indices[name] == free[0]
            ].item()
    tasks.switch_("two")
    tasks.switch_(None)
    assert same(model, base)


def test_moved_weights_are_followed_and_other_forms_refused() -> None:
    """``.data`` can be replaced without a version: the memory that was is not written again."""
    model, first, second, base = two_tasks(shared=True)
    with second.applied(model):
        after = snapshot(model)
    tasks = TaskSwitch(model, {"one": first, "two": second})
    tasks.switch_("one")
    old = model.lm_head.weight.data
    model.lm_head.weight.data = old.clone()
    before = old.clone()
    tasks.switch_("two")
    assert same(model, after) and torch.equal(old, before)
    model.lm_head.weight.data = model.lm_head.weight.data[:-1]
    with pytest.raises(ValueError, match="must keep the parameters"):
        tasks.switch_("one")
    model.lm_head.weight.data = after["lm_head.weight"].t().contiguous().t()
    with pytest.raises(ValueError, match="must keep the parameters"):
        tasks.switch_("one")
    model.lm_head.weight.data = after["lm_head.weight"].clone()
    tasks.switch_(None)
    assert same(model, base)


def test_nobody_outside_can_write_what_a_switch_keeps() -> None:
    """Positions are checked once, so a delta that is changed afterwards must not reach them."""
    model, first, second, _ = two_tasks(shared=False)
    with second.applied(model):
        after = snapshot(model)
    tasks = TaskSwitch(model, {"one": first, "two": second})
    for tensor in (*second.indices.values(), *second.values.values()):
        tensor.fill_(2**40)
    tasks.switch_("two")
    assert same(model, after)


def test_version_counters_move_where_a_switch_writes() -> None:
    model, first, second, _ = two_tasks(shared=False)
    tasks = TaskSwitch(model, {"one": first, "two": second})
    written = set(first.indices) | set(second.indices)
    tasks.switch_("one")
    before = {name: weight._version for name, weight in model.named_parameters()}
    tasks.switch_("two")
    after = {name: weight._version for name, weight in model.named_parameters()}
    assert {name for name in after if after[name] != before[name]} == written


# ------------------------------------------------------------------------------------ one pass


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_equals_two_scatters(dtype: str, rng: torch.Generator) -> None:
    """Also with positions in both lists, in one only, in none; on one thread and on two."""
    sizes = (*EDGE_SIZES, 70_001)
    shares = (0.0, 0.01, 0.5, 1.0)
    before = torch.get_num_threads()
    try:
        for first_share in shares:
            for second_share in shares:
                targets = [draw("with_nan_inf", n, DTYPES[dtype], rng) for n in sizes]
                want = [t.clone() for t in targets]
                lists: list[tuple[list[Tensor], list[Tensor]]] = []
                for share in (first_share, second_share):
                    indices = [some_positions(n, share, rng) for n in sizes]
                    values = [draw("normal", i.numel(), DTYPES[dtype], rng) for i in indices]
                    lists.append((indices, values))
                    scatter_(want, indices, values)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    got = [t.clone() for t in targets]
                    scatters = CpuScatters(got)
                    scatters.write(*(scatters.keep(*parts) for parts in lists))
                    assert_all_bits_equal(got, want, f"{first_share}, {second_share}, {threads}")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("positions", [[0, 5], [1, 1], [-1, 2], [2, 1]])
def test_wrong_positions_are_refused_when_kept(positions: list[int]) -> None:
    scatters = CpuScatters([torch.zeros(5)])
    with pytest.raises(ValueError, match=r"scatter_: indices\[0\] must be"):
        scatters.keep([torch.tensor(positions)], [torch.ones(2)])


def test_lists_of_other_targets_do_not_mix() -> None:
    parts: Any = ([torch.tensor([1])], [torch.ones(1)])
    one, other = (CpuScatters([torch.zeros(5)]) for _ in range(2))
    with pytest.raises(ValueError, match="other targets at 0"):
        one.write(one.keep(*parts), other.keep(*parts))
