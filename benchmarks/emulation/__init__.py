"""Pipelines whose computations are sleeps, so that two cores can stand for eight devices.

A layer takes a given time for its forward, its input gradient and its weight gradient; what remains to be measured is
the schedule and what the engine adds to it. A layer may offer a paired step, which sleeps as long as an overlapped
pair would take; inside it the layers' own sleeps are off.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16


@dataclass(frozen=True)
class Seconds:
    """What one layer takes: forward, input gradient, weight gradient, and a pair (None: no better than its parts)."""

    forward: float
    input_grad: float
    weight_grad: float
    pair: float | None = None

    def over(self, layers: int) -> Seconds:
        """The share of one of so many layers."""
        return Seconds(self.forward / layers, self.input_grad / layers, self.weight_grad / layers,
                       None if self.pair is None else self.pair / layers)


class Clock:
    """Where a rank spends its emulated time; switched off inside a paired step.

    A sleep is as much shorter as this machine oversleeps (0.1 ms), for a device would not.
    """

    def __init__(self) -> None:
        self.on = True
        late = []
        for _ in range(20):
            began = time.perf_counter()
            time.sleep(0.005)
            late.append(time.perf_counter() - began - 0.005)
        self.oversleep = statistics.median(late)

    def spend(self, seconds: float) -> None:
        if self.on:
            self.sleep(seconds)

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds - self.oversleep))


class _Input(torch.autograd.Function):
    """The identity, which takes the time of the input gradient in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer) -> Tensor:
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.layer.clock.spend(ctx.layer.seconds.input_grad)
        return dy, None


class _Weight(torch.autograd.Function):
    """Zero, whose gradient takes the time of the weight gradient; now, later for a sink
    (megatron_ext/layers/linear.py), or when torch's pipelining asks for weights alone: a node of its own lets it."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, layer: Layer) -> Tensor:
        ctx.weight, ctx.layer = weight, layer
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        layer, weight = ctx.layer, ctx.weight

        def accumulate(main_grad: Tensor) -> None:
            began = time.perf_counter()
            main_grad.add_(dy)
            layer.clock.spend(layer.seconds.weight_grad - (time.perf_counter() - began))

        sink = getattr(weight, "weight_grad_sink", None)
        if sink is not None:
            sink(weight, accumulate)
            return None, None
        grad = torch.zeros_like(weight)
        accumulate(grad)
        return grad, None


class Layer(nn.Module):
    """Takes `seconds`, and offers the paired step if they have one. All layers of a rank share its clock."""

    def __init__(self, seconds: Seconds, clock: Clock):
        super().__init__()
        self.seconds, self.clock = seconds, clock
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        if seconds.pair is not None:
            self.paired_step = self._paired_step

    def forward(self, x: Tensor) -> Tensor:
        began = time.perf_counter()
        y = _Input.apply(x.requires_grad_(torch.is_grad_enabled()), self) + _Weight.apply(self.weight, self)
        self.clock.spend(self.seconds.forward - (time.perf_counter() - began))
        return y

    def _paired_step(self, forward: Callable[[], None], backward: Callable[[], None], full: bool) -> None:
        """As long as the schedule counts: a pair whose backward is only "I" leaves its W for later."""
        began = time.perf_counter()
        self.clock.on = False
        forward()
        backward()
        self.clock.on = True
        assert self.seconds.pair is not None
        rest = self.seconds.pair - (0.0 if full else self.seconds.weight_grad) - (time.perf_counter() - began)
        self.clock.sleep(rest)


def time_pipeline(engine: Any) -> list[float]:
    """A list of one number: the seconds of the engine's last pipeline, without what comes before and after it."""
    run, alone = engine.executor.run, [0.0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        outcome = run(*args, **kwargs)
        alone[0] = time.perf_counter() - began
        return outcome

    engine.executor.run = timed
    return alone


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """Calls `function(rank, *args)` in so many processes over gloo; returns what rank 0 did.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "megatron_ext.engine.engine"])  # 25 s for eight ranks
    results = context.Queue()
    started = [context.Process(target=_rank, args=(rank, ranks, port, results, function, args))
               for rank in range(ranks)]
    for process in started:
        process.start()
    found = None
    while any(process.is_alive() for process in started):
        if not results.empty():
            found = results.get()
        if any(process.exitcode for process in started):
            for process in started:
                process.kill()
            raise SystemExit("a rank failed")
        time.sleep(0.05)
    return results.get() if found is None and not results.empty() else found


def _rank(rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port), DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    import logging
    import warnings

    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # compile nothing: these engines need no operator of DeepSpeed's
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = function(rank, *args)
    if rank == 0:
        results.put(found)
    torch.distributed.barrier()
