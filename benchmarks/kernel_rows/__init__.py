"""Rows of benchmarks/kernels.py: what a row is, how it is judged, and what stands on the roofline.

A group is a generator of rows and points about one line of the goals table; every case in it is guarded, so that what
fails is reported in its own row. `cpu.py`, `products.py`, `memory.py` and `layer.py` hold the groups, `timing.py` takes
times, `peers.py` knows what others are called, `isolation.py` runs a group in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kernel_rows.timing import Taken, first_line

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Row:
    """What is written as JSON; `ratio` is how many times better than the peer, `holds` None where nothing is judged."""

    name: str
    value: float | None
    unit: str
    peer: str = "none"
    peer_value: float | None = None
    ratio: float | None = None
    goal: str = "none"
    holds: bool | None = None


@dataclass(frozen=True)
class Point:
    """One measurement in the picture, `ours` or a peer's; one without flops stands among those that move memory."""

    name: str
    flops: float
    bytes: float
    seconds: float
    ours: bool


Item = Row | Point


@dataclass(frozen=True)
class Work:
    """What one call computes and moves, and the unit in which its time is told: TFLOPS, GB/s or ms."""

    flops: float
    bytes: float
    unit: str = "TFLOPS"

    def told(self, seconds: float) -> float:
        speeds = {"TFLOPS": self.flops / seconds / TERA, "GB/s": self.bytes / seconds / GIGA, "ms": 1000 * seconds}
        return speeds[self.unit]


def contest(name: str, work: Work, times: dict[str, Taken], goals: dict[str, float | None],
            least: float | None = None, backend: str = "") -> Iterator[Item]:
    """Rows of one contest: ours against each peer, and against an absolute speed.

    Args:
        times: by name; "ours" is ours.
        goals: peer -> how many times faster ours is to be, None for a peer without a goal.
        least: the speed to reach, in the work's unit.
        backend: what ours ran on.
    """
    ours = times["ours"]
    label = f"{name} [{backend}]" if backend else name
    if ours.seconds is None:
        yield failed(label, ours.why or "", work.unit)
        return
    label += "" if ours.how != "events" else ", by events"
    value = work.told(ours.seconds)
    yield Point(name, work.flops, work.bytes, ours.seconds, True)
    if least is not None:
        yield Row(label, value, work.unit, "absolute", least, value / least, f"{least:g} {work.unit}", value >= least)
    for peer, goal in goals.items():
        told = "none" if goal is None else f"{goal:g}x"
        theirs = times[peer]
        if theirs.seconds is None:
            yield Row(label, value, work.unit, f"{peer}: {theirs.why}", goal=told)
            continue
        ratio = theirs.seconds / ours.seconds
        peer_name = peer + (", by events" if theirs.how == "events" else "")
        yield Row(label, value, work.unit, peer_name, work.told(theirs.seconds), ratio, told,
                  None if goal is None else ratio >= goal)
        yield Point(f"{name}, {peer}", work.flops, work.bytes, theirs.seconds, False)


def failed(name: str, why: str, unit: str = "none") -> Row:
    """The row of what could not be measured; it falls short."""
    return Row(name, None, unit, f"not measured: {why}", goal="a figure", holds=False)


def at_most(name: str, value: float, unit: str, goal: float, peer: str = "none",
            peer_value: float | None = None) -> Row:
    """A row whose value is to be small; NaN does not hold."""
    return Row(name, value, unit, peer, peer_value, None if not peer_value else value / peer_value,
               f"at most {goal:g}", not math.isnan(value) and value <= goal)


def guarded(name: str, case: Callable[..., Iterable[Item]], *args: Any) -> Iterator[Item]:
    """The items of a case; what it raises becomes the row that falls short."""
    try:
        yield from case(*args)
    except Exception as error:
        yield failed(name, f"{type(error).__name__}: {first_line(error)}")
