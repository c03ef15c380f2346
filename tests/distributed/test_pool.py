"""The pool itself: results in order, errors with the rank's traceback, hangs that end, nothing kept for later."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import WorkerError, WorkerPool


def rank_and_sum(x: torch.Tensor, scale: float = 1.0) -> tuple[int, torch.Tensor]:
    total = x * scale * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), total


def environment() -> tuple[str, str, str, int, str, bool]:
    import deepspeed

    place = os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]
    return *place, torch.get_num_threads(), dist.get_backend(), deepspeed.comm.is_initialized()


def fail_in(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the message of the rank")
    dist.barrier()  # the others wait for it


def die_in(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.empty(1), src=1)


def leave_traces() -> None:
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP["ep_size_2"] = dist.new_group([0, 1])
    groups._EXPERT_PARALLEL_GROUP_RANKS["ep_size_2"] = [0, 1]
    groups.mpu = object()
    torch.manual_seed(dist.get_rank() + 99)


def traces() -> tuple[list[dict], object, int, float]:
    from deepspeed.utils import groups

    dictionaries = [dict(groups._EXPERT_PARALLEL_GROUP), dict(groups._EXPERT_PARALLEL_GROUP_RANKS)]
    return dictionaries, groups.mpu, len(dist.distributed_c10d._world.pg_map), torch.rand(()).item()


def process_id() -> int:
    return os.getpid()


def test_results_come_in_the_order_of_the_ranks(pool2: WorkerPool) -> None:
    results = pool2.run(rank_and_sum, torch.ones(3), scale=2.0)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(total, torch.full((3,), 6.0)) for _, total in results)


def test_every_rank_knows_its_place(pool2: WorkerPool) -> None:
    assert pool2.run(environment) == [("0", "2", "0", 1, "gloo", True), ("1", "2", "1", 1, "gloo", True)]


def test_processes_persist(pool2: WorkerPool) -> None:
    assert pool2.run(process_id) == pool2.run(process_id)


def test_an_exception_names_its_rank_and_the_pool_recovers(pool2: WorkerPool) -> None:
    message = r"rank 1 raised KeyError: 'the message of the rank'\nTraceback[^$]*fail_in"
    with pytest.raises(WorkerError, match=message) as raised:
        pool2.run(fail_in, 1)
    assert raised.value.rank == 1
    assert len(pool2.run(process_id)) == 2


def test_a_dead_rank_is_noticed_at_once(pool2: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 died with exit code -9"):
        pool2.run(die_in, 1)
    assert time.monotonic() - start < 20
    assert len(pool2.run(process_id)) == 2


def test_a_hang_ends_in_the_time_asked_for_and_shows_where(pool2: WorkerPool) -> None:
    pool2.run(process_id)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"ranks \[0\] not done after 1 s[^$]*rank 0[^$]*in wait_for_nobody"):
        pool2.run(wait_for_nobody, timeout=1.0)
    assert time.monotonic() - start < 10
    assert len(pool2.run(process_id)) == 2


def test_nothing_of_one_call_is_left_in_the_next(pool2: WorkerPool) -> None:
    untouched = pool2.run(traces)
    pool2.run(leave_traces)
    assert pool2.run(traces) == untouched
    dictionaries, mpu, groups, _ = untouched[0]
    assert (dictionaries, mpu, groups) == ([{}, {}], None, 1)


def test_a_function_that_cannot_be_sent_fails_here(pool2: WorkerPool) -> None:
    with pytest.raises((AttributeError, TypeError)):
        pool2.run(lambda: None)
    assert len(pool2.run(process_id)) == 2
