"""A training step on a GPU: several ranks on one device over gloo, and one rank per device over NCCL.

Not yet run on a device: none was at hand when this was written. `make test-gpu` runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared_gpu() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, device="cuda")
    yield pool
    pool.close()


@pytest.mark.parametrize("case", [Case(zero=0, dropout=0.0), Case(zero=1), Case(zero=1, offload=True)], ids=str)
def test_two_ranks_on_one_gpu_equal_one_process_on_the_cpu(shared_gpu: WorkerPool, case: Case) -> None:
    """FP32 without TF32; the CPU sums in another order, hence 1e-4."""
    found = shared_gpu.run(equality.train, case, timeout=280)[0]
    equality.compare(found, equality.reference(case), tolerance=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, one for each rank")
def test_the_example_trains_over_nccl(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "examples/pretrain_deepseek_v3.py",
               "--stages", "2", "--steps", "5", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "metrics.csv").read_text().count("\n") >= 6
