"""Peers that disagree about what they send, and peers that are gone: one error on every rank, in time."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.comm.dispatch import Dispatcher, DispatchError, Transit
from megatron_ext.config.errors import UserError
from tests.comm.journeys import STEPS, E, Journey, Steps, choices, here
from tests.distributed.equality import Case, batches, build
from tests.distributed.pool import WorkerError, WorkerPool

DIFFERENCES = {"hidden": "size 64", "dtype": "bfloat16", "dispatch": "dispatch fp8", "combine": "combine bf16",
               "chunks": "chunks 2", "hops": "two hops over nodes of 2 ranks", "k": "1 of 8 experts"}


def disagree() -> dict[str, str]:
    """Rank 0 differs from the others in one thing after the other."""
    messages, place = {}, here(2)
    for what in DIFFERENCES:
        differs = what if dist.get_rank() == 0 else None
        x = torch.randn(3, 64 if differs == "hidden" else 32, dtype=torch.bfloat16 if differs == "dtype" else None)
        way = Dispatcher(E, place, "fp8" if differs == "dispatch" else "model",
                         "bf16" if differs == "combine" else "model", chunks=2 if differs == "chunks" else 1,
                         two_hop=differs == "hops")
        experts = torch.tensor([[0, 1], [2, 3], [1, 2]])[:, : 1 if differs == "k" else 2]
        try:
            way.announce(experts, x).start_dispatch(x, torch.ones(experts.shape))
        except DispatchError as error:
            messages[what] = str(error)
    return messages


def test_every_rank_names_a_peer_that_sends_something_else(pool4: WorkerPool):
    for messages in pool4.run(disagree):
        for what, word in DIFFERENCES.items():
            assert messages[what].startswith("expert dispatch: rank ") and word in messages[what]
            assert "2 of 8 experts, hidden size 32 in torch.float32" in messages[what]


def lost(per_node: int | None, dies: bool, leaves_before: str) -> tuple[str, float]:
    """The last rank leaves in the middle; what the others meet, and how long after."""
    way = Dispatcher(E, here(per_node, timedelta(seconds=1)), two_hop=per_node is not None)
    steps, began = Steps(Journey(choices(9, 4, 2, 7)), way), 0.0
    try:
        for step in (*STEPS, "finish"):
            if step == leaves_before:
                began = time.perf_counter()
                if dist.get_rank() == 3:
                    if dies:
                        os._exit(3)
                    time.sleep(2.5)
                    return "", 0.0
            getattr(steps, step)()
    except DispatchError as error:
        return str(error), time.perf_counter() - began
    return "no error", 0.0


@pytest.mark.parametrize("per_node", [None, 2])
@pytest.mark.parametrize("leaves_before, kind", [
    ("experts", "(dispatch|combine)"), ("start_backward", "combine backward")])
def test_a_peer_that_stops_is_noticed_on_every_rank_in_time(pool4: WorkerPool, per_node: int | None,
                                                            leaves_before: str, kind: str):
    """With two hops a rank may only hear of it through another that has given up."""
    *others, _ = pool4.run(lost, per_node, False, leaves_before)
    for rank, (message, seconds) in enumerate(others):
        start = rf"expert dispatch: {kind} among ranks \[0, 1, 2, 3\] failed on rank {rank}, .*: ."
        assert re.match(start, message), message
        assert seconds < 2.5


def give_up_with_the_error() -> None:
    message, _ = lost(None, True, "experts")
    raise DispatchError(message)


def test_a_peer_that_dies_is_noticed_on_every_rank():
    pool = WorkerPool(4)
    with pytest.raises(WorkerError) as caught:
        pool.run(give_up_with_the_error)
    pool.close()
    for rank in range(3):
        assert re.search(rf"rank {rank} (then )?raised DispatchError: expert dispatch: (dispatch|combine) among ranks "
                         rf"\[0, 1, 2, 3\] failed on rank {rank}", str(caught.value)), str(caught.value)
    assert "rank 3 " in str(caught.value) and "exit code 3" in str(caught.value)


# -- in a training step

CASE = Case(2, 2, 2, steps=1, section={"expert_parallel": {"dispatch_chunks": 1}})


def die_in_the_step(folder: Path) -> None:
    """Rank 3 dies in its third dispatch; the others write down what they meet, and end as a script would."""
    engine = build(CASE)
    start, left = Transit.start_dispatch, 3

    def start_dispatch(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if not left and dist.get_rank() == 3:
            os._exit(3)
        start(*arguments)

    Transit.start_dispatch = start_dispatch  # type: ignore[method-assign]
    try:
        engine.train_batch(batches(engine, CASE))
    except UserError as error:
        (folder / str(dist.get_rank())).write_text(f"{type(error).__name__}: {error}")
    os._exit(4)


def test_a_rank_that_dies_in_a_step_ends_it_on_every_rank(tmp_path: Path) -> None:
    pool = WorkerPool(4)
    with pytest.raises(WorkerError, match="exit code 3"):
        pool.run(die_in_the_step, tmp_path)
    pool.close()
    met = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert re.match(r"DispatchError: expert dispatch: .* failed on rank 2, a peer has stopped or is late", met[2])
    for rank in (0, 1):
        assert re.match(rf"MessageError: rank {rank} waited for rank {rank + 2}, the (activation|gradient|labels) of |"
                        "DispatchError: expert dispatch", met[rank]), met[rank]
