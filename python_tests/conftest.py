"""Settings for every test: a seed from its name, a thread count, and what runs by default."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers.cases import fewer

# Examples are drawn from the test's own source, so a failure in CI repeats at home; no time limit
# per example, because the machine may be busy.
settings.register_profile(
    "piece_ops",
    derandomize=True,
    max_examples=max(5, fewer(100)),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("piece_ops")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked slow, unless -m says what to run."""
    if config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="slow: run it with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch and NumPy from the test's name; one thread; restore the float mode.

    One thread, because pytest-xdist workers share the cores and OpenMP threads that wait for one
    another there cost milliseconds a call. Tests that are about threads set their own number.
    """
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded from the test's name."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))
