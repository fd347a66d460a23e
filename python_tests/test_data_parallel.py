"""Two processes under DistributedDataParallel: only the values' gradients travel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helpers.data_parallel_worker import STEPS, train_alone, work, wrapped_model
from helpers.tolerances import TRAINING_50_STEPS

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    patch = pytest.MonkeyPatch()
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with patch.context():
        mp.spawn(work, args=(WORLD, folder), nprocs=WORLD)
    patch.undo()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("run", ["plain", "no_sync"])
def test_only_the_values_are_reduced(ranks: list[dict[str, Any]], run: str) -> None:
    k = sum(values.numel() for values in ranks[0][run]["values"].values())
    for rank in ranks:
        assert sum(rank[run]["bytes"]) == STEPS * 4 * k


def test_a_step_sends_the_values_gradients_and_nothing_else(ranks: list[dict[str, Any]]) -> None:
    """Every collective is counted; with broadcast_buffers the model's buffers go out, too."""
    k = sum(values.numel() for values in ranks[0]["plain"]["values"].values())
    buffers = sum(buffer.numel() for buffer in wrapped_model().buffers())
    for rank in ranks:
        without, with_buffers = rank["collectives"]
        assert without == [("all_reduce", k)]
        assert with_buffers == [("broadcast", buffers), ("all_reduce", k)]


@pytest.mark.parametrize("run", ["plain", "no_sync"])
def test_all_ranks_hold_the_same_bits(ranks: list[dict[str, Any]], run: str) -> None:
    for part in ("values", "weights"):
        for name, tensor in ranks[0][run][part].items():
            assert torch.equal(tensor, ranks[1][run][part][name]), name


@pytest.mark.parametrize("run", ["plain", "no_sync"])
def test_two_processes_learn_what_one_learns_from_the_joint_batch(
    ranks: list[dict[str, Any]], run: str
) -> None:
    alone = train_alone()
    for name, values in alone["values"].items():
        error = (ranks[0][run]["values"][name] - values).abs()
        assert bool((error <= TRAINING_50_STEPS * (1 + values.abs())).all()), name
    for name, weight in alone["weights"].items():
        error = (ranks[0][run]["weights"][name] - weight).abs()
        assert bool((error <= TRAINING_50_STEPS * (1 + weight.abs())).all()), name


def test_the_state_has_the_names_of_the_wrapped_model(ranks: list[dict[str, Any]]) -> None:
    keys = ranks[0]["plain"]["keys"]
    assert "module.values.model.layers.0.mlp.up_proj.weight" in keys
    assert "module.positions.model.layers.0.mlp.up_proj.weight" in keys and "module.base" in keys
    assert not any(key.startswith("module.model.") for key in keys)


def test_layers_that_a_step_does_not_use(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["branches"]
        assert found.keys() == {f"{n}.{a}" for n in ("used", "unused") for a in ("weight", "bias")}
        assert found["unused.weight"] is None or not found["unused.weight"].any()
        assert torch.equal(found["used.weight"], ranks[0]["branches"]["used.weight"])
        assert found["used.weight"].all()
