"""Schedules by name: pure functions from sizes, and where they can use them measured times, to a `Plan`."""

from __future__ import annotations

import difflib
import math

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.schedules.bidirectional import bidirectional
from megatron_ext.pipeline.schedules.dualpipe import dualpipe
from megatron_ext.pipeline.simulator import Times

NAMES = ("dualpipe",)


def schedule(
    name: str,
    stages: int,
    micro_batches: int,
    times: Times | None = None,
    chunks: int = 1,
    memory_limit: float | None = None,
) -> Plan:
    """The plan of one step.

    Args:
        name: one of `NAMES`.
        stages: P, the number of pipeline ranks.
        micro_batches: m, of all directions together.
        times: measured on the job; shapes the orders that are searched for (DualPipe with m < 2P-2).
        chunks: stages of one direction on each rank, for interleaved schedules.
        memory_limit: activations a rank may hold, in its whole share of the model for one micro-batch.

    Raises:
        ConfigError: the schedule does not exist or cannot have these sizes; names the nearest that works.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise ConfigError("pipeline.schedule", name, f"no such schedule; known: {', '.join(map(repr, NAMES))}", hint)
    return _bidirectional_plan(stages, micro_batches, times, chunks, memory_limit)


def _bidirectional_plan(
    stages: int, micro_batches: int, times: Times | None, chunks: int, memory_limit: float | None
) -> Plan:
    """DualPipe from 2P-2 micro-batches on, and a searched order on the same placement below."""
    if not _is_count(stages) or stages < 2 or stages % 2:
        rule = "dualpipe runs from both ends and needs an even number of stages, at least 2"
        raise ConfigError("pipeline.stages", stages, rule, f"try {_nearest_even(stages)}")
    if not _is_count(micro_batches) or micro_batches < 2 or micro_batches % 2:
        rule = "dualpipe needs an even number of micro-batches, as many in each of its two directions, at least 2"
        raise ConfigError("micro_batches", micro_batches, rule, f"try {_nearest_even(micro_batches)}")
    if chunks != 1:
        rule = "dualpipe has one stage of each direction on a rank"
        raise ConfigError("pipeline.chunks", chunks, rule, "set it to 1")
    limit = stages + 1 if memory_limit is None else memory_limit
    if micro_batches >= 2 * stages - 2:
        if limit < stages + 1:
            rule = f"dualpipe on {stages} ranks holds {stages + 1} activations"
            raise ConfigError("pipeline.memory_limit", memory_limit, rule, f"allow {stages + 1} or use fewer stages")
        return dualpipe(stages, micro_batches)
    plan = bidirectional(stages, micro_batches, times, min(math.floor(limit), stages + 1))
    if plan is None:
        rule = f"no order of {micro_batches} micro-batches on {stages} ranks found that holds so few activations"
        raise ConfigError("pipeline.memory_limit", memory_limit, rule, f"allow {min(micro_batches, stages + 1)}")
    return plan


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _nearest_even(value: object) -> str:
    if not isinstance(value, (int, float)) or value <= 2 or not math.isfinite(value):
        return "2"
    below = 2 * math.floor(value / 2)
    return f"{below} or {below + 2}"
