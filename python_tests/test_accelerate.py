"""Two processes under accelerate: the result of one, k numbers a step, and the example resumed."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("accelerate")
from piece_ops.delta import Delta

from helpers.accelerate_worker import work
from helpers.data_parallel_worker import ROWS, STEPS, train_alone
from helpers.tolerances import TRAINING_50_STEPS

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(work, args=(WORLD, port, folder), nprocs=WORLD)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def test_only_the_values_are_reduced(ranks: list[dict[str, Any]]) -> None:
    k = sum(values.numel() for values in ranks[0]["loop"]["values"].values())
    for rank in ranks:
        assert sum(rank["loop"]["bytes"]) == STEPS * 4 * k
        assert rank["loop"]["rows"] == STEPS * ROWS // WORLD


def test_two_processes_learn_what_one_learns_from_the_joint_batch(
    ranks: list[dict[str, Any]],
) -> None:
    alone = train_alone()
    for part in ("values", "weights"):
        for name, wanted in alone[part].items():
            got = ranks[0]["loop"][part][name]
            assert torch.equal(got, ranks[1]["loop"][part][name]), name
            assert bool(((got - wanted).abs() <= TRAINING_50_STEPS * (1 + wanted.abs())).all()), (
                name
            )


def test_the_example_resumes_on_two_processes_with_the_same_bits(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    whole = ranks[0]["whole"]
    for run in (*(rank[key] for rank in ranks for key in ("whole", "resumed")),):
        for part in ("values", "weights"):
            for name, tensor in whole[part].items():
                assert torch.equal(run[part][name], tensor), name
    half = ranks[0]["half"]["values"]
    assert not all(torch.equal(half[name], whole["values"][name]) for name in half)
    for run in ("whole", "half"):
        checkpoint = folder / run / "checkpoint-6"
        states = {path.name for path in checkpoint.glob("random_states_*")}
        assert states == {f"random_states_{rank}.pkl" for rank in range(WORLD)}
    delta = Delta.from_pretrained(folder / "whole")
    weights = whole["weights"]
    for name, positions in delta.indices.items():
        assert torch.equal(weights[name].flatten()[positions], delta.values[name]), name
