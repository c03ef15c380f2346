"""Medians of calls that take turns, on a CPU by the clock and on a GPU by CUDA graphs.

On a GPU every function is called a few times (what it compiles, it compiles now), then captured into a CUDA graph; one
that cannot be captured, because it waits for the GPU or launches from elsewhere, is called and timed between events,
and its row says so. Before each measurement a buffer larger than the L2 cache is overwritten, which also gives the host
the time to enqueue what follows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSHED = 256 * 2**20
"""Bytes that are overwritten between measurements; the L2 cache of an H100 has 50 MiB."""

WARM_UP = 3


@dataclass(frozen=True)
class Taken:
    """How long a function takes, or why that is not known.

    Attributes:
        seconds: the median, or None.
        how: "clock", "graph" or "events".
        why: there is none, if there is none.
    """

    seconds: float | None
    how: str = "clock"
    why: str | None = None


Contestants = dict[str, Callable[[], Any] | str]
"""By name: what to call, or why it cannot be called."""


def take_turns(contestants: Contestants, rounds: int, device: torch.device) -> dict[str, Taken]:
    """Times the contestants in turn, `rounds` times each; one that raises keeps its reason."""
    runners: dict[str, tuple[Callable[[], float], str]] = {}
    taken: dict[str, Taken] = {}
    for name, function in contestants.items():
        if isinstance(function, str):
            taken[name] = Taken(None, why=function)
            continue
        try:
            runners[name] = _on_gpu(function, device) if device.type == "cuda" else _on_cpu(function)
        except Exception as error:
            taken[name] = Taken(None, why=f"{type(error).__name__}: {first_line(error)}")
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, (run, _) in runners.items():
            seconds[name].append(run())
    return taken | {name: Taken(statistics.median(seconds[name]), how) for name, (_, how) in runners.items()}


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a row."""
    return next(iter(str(error).splitlines()), "no message")[:200]


def _on_cpu(function: Callable[[], Any]) -> tuple[Callable[[], float], str]:
    function()

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run, "clock"


def _on_gpu(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], float], str]:
    side = torch.cuda.Stream(device)  # what a capture needs to have run before must not have run on the default stream
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    call: Callable[[], Any]
    try:
        with torch.cuda.graph(graph):
            function()
        call, how = graph.replay, "graph"
    except Exception:
        torch.cuda.synchronize(device)
        call, how = function, "events"
    call()
    torch.cuda.synchronize(device)
    buffer = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return run, how
