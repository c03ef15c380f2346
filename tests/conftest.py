"""What every test starts from: one thread, fixed seeds, no display, pools of ranks shared by the whole run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy
import pytest
import torch
from hypothesis import settings

from tests.distributed.pool import SEED, WorkerPool

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _pool(world_size: int) -> Iterator[WorkerPool]:
    pool = WorkerPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool2() -> Iterator[WorkerPool]:
    """Two ranks over gloo; `pool2.run(function, *args)`. Started when first used."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool4() -> Iterator[WorkerPool]:
    """Four ranks, as `pool2`."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def pool8() -> Iterator[WorkerPool]:
    """Eight ranks, as `pool2`."""
    yield from _pool(8)
