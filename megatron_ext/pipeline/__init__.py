"""Pipeline schedules as data: made by `schedule`, proved by `verify`, timed by `simulate`, drawn by `draw`."""

from __future__ import annotations

from megatron_ext.pipeline.bounds import any_placement_bound, lower_bound
from megatron_ext.pipeline.drawing import draw
from megatron_ext.pipeline.instructions import Compute, Message, Pair, Plan, ScheduleError, Transfer
from megatron_ext.pipeline.phases import Phases
from megatron_ext.pipeline.schedules import schedule
from megatron_ext.pipeline.simulator import Result, Times, simulate
from megatron_ext.pipeline.timeline import Span, Timeline
from megatron_ext.pipeline.verifier import verify

__all__ = [
    "Compute",
    "Message",
    "Pair",
    "Phases",
    "Plan",
    "Result",
    "ScheduleError",
    "Span",
    "Timeline",
    "Times",
    "Transfer",
    "any_placement_bound",
    "draw",
    "lower_bound",
    "schedule",
    "simulate",
    "verify",
]
