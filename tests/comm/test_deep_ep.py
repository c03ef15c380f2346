"""The transport over DeepEP, against a stand-in of its documented face; and when it is not chosen."""

from __future__ import annotations

import logging
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.comm import deep_ep
from megatron_ext.comm.dispatch import Dispatcher
from megatron_ext.parallel.expert_parallel import ExpertParallel
from tests.comm import fake_deep_ep
from tests.comm.journeys import STEPS, E, Journey, Steps, choices, here
from tests.distributed.pool import WorkerPool

CUDA = torch.device("cuda")  # a name; nothing here needs one


def travel(journey: Journey) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Over DeepEP and over torch.distributed; whether every event was waited for."""
    sys.modules["deep_ep"] = fake_deep_ep
    place = here()
    buffer = deep_ep.connect(place, journey.hidden, journey.dtype, CUDA)
    ways = (Dispatcher(E, place, journey.dispatch, "bf16", chunks=2, buffer=buffer),
            Dispatcher(E, place, journey.dispatch, "bf16"))
    found = []
    for way in ways:
        steps = Steps(journey, way)
        for step in STEPS:
            getattr(steps, step)()
            steps.transit.advance()
        found.append(steps.finish())
    # the layout's is waited for by the dispatch, on the device
    return found[0], found[1], all(event.waited for event in buffer.events[1:])


@pytest.mark.parametrize("dispatch", ["model", "fp8"])
def test_it_finds_what_torch_distributed_does(pool2: WorkerPool, dispatch: str):
    journey = Journey(choices(9, 4), dispatch, "bf16", dtype=torch.bfloat16, hidden=128)
    for over_deep_ep, over_torch, waited in pool2.run(travel, journey):
        assert waited
        for name, value in over_torch.items():
            # with two ranks even the order of the last sum is the same
            torch.testing.assert_close(over_deep_ep[name], value, rtol=2**-7, atol=2**-8, msg=name)
            assert (over_deep_ep[name] != value).float().mean() < 0.01


def test_no_tokens_at_all(pool2: WorkerPool):
    for over_deep_ep, over_torch, _ in pool2.run(travel, Journey(choices(0, 0), dtype=torch.bfloat16, hidden=128)):
        assert all(over_deep_ep[name].shape == value.shape for name, value in over_torch.items())


def group(size: int = 2) -> ExpertParallel:
    return ExpertParallel(SimpleNamespace(), size, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("ep, hidden, dtype, device, reason", [
    (ExpertParallel.single(), 128, torch.bfloat16, CUDA, "experts are not split over ranks"),
    (group(), 128, torch.bfloat16, torch.device("cpu"), "it needs CUDA, not cpu"),
    (group(), 128, torch.float32, CUDA, "it needs a BF16 model .*, not torch.float32 with 128"),
    (group(), 96, torch.bfloat16, CUDA, "it needs a BF16 model .*, not torch.bfloat16 with 96"),
    (group(), 128, torch.bfloat16, CUDA, r"deep_ep cannot be imported \(.*deep_ep.*\)"),
    (group(4), 128, torch.bfloat16, CUDA, "another rank of the expert group cannot import it"),
    (group(3), 128, torch.bfloat16, CUDA, r"deep_ep refuses 3 ranks \(AssertionError: Unsupported number")])
def test_one_line_says_why_it_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                          ep: ExpertParallel, hidden: int, dtype: torch.dtype, device: torch.device,
                                          reason: str):
    monkeypatch.setitem(sys.modules, "deep_ep", fake_deep_ep if ep.size > 2 else None)
    with caplog.at_level(logging.INFO, "megatron_ext"):
        assert deep_ep.connect(ep, hidden, dtype, device, everywhere=lambda ready, ep: ready and ep.size != 4) is None
    [record] = caplog.records
    assert re.fullmatch(
        f"expert dispatch over torch.distributed, not DeepEP: {reason}.*", record.getMessage())
