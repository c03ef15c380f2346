"""Pairs that take turns on a GPU: the same bits as one after the other, and no wait of the host but for the counts.

Not yet run on a device: none was at hand when this was written. `make test-gpu` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.comm.dispatch import Dispatcher
from megatron_ext.parallel.expert_parallel import ExpertParallel
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool
from tests.distributed.test_overlap import same, section, train, with_overlap

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def shared_gpu() -> Iterator[WorkerPool]:
    pool = WorkerPool(4, device="cuda")
    yield pool
    pool.close()


@pytest.mark.parametrize("case", [
    Case(2, 2, 2, dropout=0.1, steps=3, section=section("model")),
    Case(2, 2, 2, dropout=0.1, steps=3, section=section("fp8", ("attention", "mlp"))),
], ids=str)
def test_taking_turns_changes_nothing(shared_gpu: WorkerPool, case: Case) -> None:
    """Four ranks on one device over gloo."""
    together = shared_gpu.run(train, with_overlap(case, True), timeout=280)[0]
    apart = shared_gpu.run(train, with_overlap(case, False), timeout=280)[0]
    same(together, apart)
    assert max(together["turns"]) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_only_for_the_counts(tmp_path: Any) -> None:
    """One rank over NCCL, with torch raising on every other wait."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        tokens = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
        experts = torch.rand(64, 8, device="cuda").topk(2).indices
        weights = torch.rand(64, 2, device="cuda")
        way = Dispatcher(8, ExpertParallel(dist.group.WORLD, 1, 0), "fp8", "bf16").announce(experts, tokens)
        way.start_dispatch(tokens, weights)
        torch.cuda.set_sync_debug_mode("error")
        rows, row_weights = way.finish_dispatch(0)
        way.start_combine([rows], [row_weights])
        y = way.finish_combine()
        way.start_combine_backward(y)
        drows, dweights = way.finish_combine_backward(0, rows, row_weights)
        way.start_dispatch_backward([drows], [dweights])
        way.finish_dispatch_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
