"""Schedules by name: pure functions from sizes, and where they can use them measured times, to a `Plan`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ext.config.errors import ConfigError
from megatron_ext.parallel.placement import Placement, ring, wave
from megatron_ext.parallel.placement import bidirectional as both_ways
from megatron_ext.pipeline.instructions import Plan, without_cycles
from megatron_ext.pipeline.schedules.chimera import chimera
from megatron_ext.pipeline.schedules.dualpipe import dualpipe, dualpipev
from megatron_ext.pipeline.schedules.dualpipe_zb import dualpipe_zb
from megatron_ext.pipeline.schedules.greedy import Candidate, Problem, Rule
from megatron_ext.pipeline.schedules.interleaved import interleaved
from megatron_ext.pipeline.schedules.plain import gpipe, one_f_one_b, zb_h1
from megatron_ext.pipeline.schedules.searched import FEW, MANY, list_scheduled, shortest
from megatron_ext.pipeline.schedules.zbv import zbv
from megatron_ext.pipeline.simulator import Times
from megatron_ext.pipeline.verifier import verify


@dataclass(frozen=True)
class Sizes:
    """What a schedule is made for; the arguments of `schedule`, checked.

    Attributes:
        memory_limit: activations a rank may hold, in its whole share of the model for one micro-batch; None: as many as
            the schedule usually does.
    """

    stages: int
    micro_batches: int
    chunks: int
    times: Times | None
    memory_limit: float | None


@dataclass(frozen=True)
class _Family:
    """A schedule and the sizes it can have.

    Attributes:
        make: the plan, for sizes that pass the checks.
        place: (P, chunks) -> its placement.
        chunks: stages of one direction per rank: the fixed number, or None if it is free.
        least_chunks: where it is free; also what 1, the default of the config, then means.
        even: P must be even, for both directions mirror each other.
        multiple: m must be a multiple of this, given P.
        keeps_limit: it is made within a memory limit; others are refused if they exceed it.
    """

    make: Callable[[Sizes], Plan]
    place: Callable[[int, int], Placement]
    chunks: int | None = 1
    least_chunks: int = 1
    even: bool = False
    multiple: Callable[[int], int] = lambda stages: 1
    keeps_limit: bool = False


def _dualpipe(sizes: Sizes) -> Plan:
    """DualPipe from 2P-2 micro-batches on, and a searched order on the same placement below."""
    if sizes.micro_batches >= 2 * sizes.stages - 2:
        return dualpipe(sizes.stages, sizes.micro_batches)
    return _searched("dualpipe", both_ways, sizes, FEW)


def _dualpipe_zb(sizes: Sizes) -> Plan:
    """DualPipe with its W's moved where its order exists and fits the limit, else a searched order."""
    P, m = sizes.stages, sizes.micro_batches
    limit = P + 1 if sizes.memory_limit is None else min(sizes.memory_limit, P + 1)
    if m % 2 == 0 and m >= 2 * P - 2 and limit >= min(P + 1, m):
        plan = shortest("dualpipe_zb", both_ways(P), m, sizes.times, limit, dualpipe_zb)
        assert plan is not None
        return plan
    return _searched("dualpipe_zb", both_ways, sizes, (*FEW, *MANY))


def _searched(
    name: str, place: Callable[[int, int], Placement], sizes: Sizes, rules: Sequence[Rule] = MANY
) -> Plan:
    """The best order that list scheduling finds, by default within P+1 activations."""
    placement = place(sizes.stages, sizes.chunks)
    limit = sizes.stages + 1 if sizes.memory_limit is None else min(sizes.memory_limit, sizes.micro_batches)

    def candidates(problem: Problem, times: Times) -> Iterator[Candidate]:
        return list_scheduled(problem, times, rules)

    plan = shortest(name, placement, sizes.micro_batches, sizes.times, limit, candidates)
    if plan is None:
        least = len(placement)
        rule = f"{name} holds at least {least} activation{'s' * (least > 1)}, one micro-batch of each direction"
        raise ConfigError("pipeline.memory_limit", sizes.memory_limit, rule, f"allow {least}")
    return plan


_FAMILIES: dict[str, _Family] = {
    "gpipe": _Family(lambda s: gpipe(s.stages, s.micro_batches), ring),
    "1f1b": _Family(lambda s: one_f_one_b(s.stages, s.micro_batches), ring),
    "interleaved": _Family(
        lambda s: interleaved(s.stages, s.micro_batches, s.chunks), ring, None, 2, multiple=lambda P: P),
    "interleaved_paired": _Family(
        lambda s: interleaved(s.stages, s.micro_batches, s.chunks, True), ring, None, 2, multiple=lambda P: P),
    "zb_h1": _Family(lambda s: zb_h1(s.stages, s.micro_batches), ring),
    "zbv": _Family(lambda s: zbv(s.stages, s.micro_batches), wave, 2),
    "dualpipe": _Family(_dualpipe, both_ways, even=True, multiple=lambda P: 2),
    "dualpipe_zb": _Family(_dualpipe_zb, both_ways, even=True, keeps_limit=True),
    "dualpipe_interleaved": _Family(
        lambda s: _searched("dualpipe_interleaved", both_ways, s), both_ways, None, even=True, keeps_limit=True),
    "wave": _Family(lambda s: _searched("wave", wave, s), wave, None, keeps_limit=True),
    "dualpipev": _Family(lambda s: dualpipev(s.stages, s.micro_batches), wave, 2),
    "chimera": _Family(lambda s: chimera(s.stages, s.micro_batches), both_ways, even=True, multiple=lambda P: P),
}
NAMES = tuple(_FAMILIES)


@without_cycles
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
        times: measured on the job; shapes the orders that are searched for.
        chunks: stages of one direction on each rank; see `chunks_of`.
        memory_limit: activations a rank may hold, in its whole share of the model for one micro-batch.

    Raises:
        ConfigError: the schedule does not exist or cannot have these sizes; names the nearest that works.
    """
    family = _family(name, stages, chunks)
    sizes = Sizes(stages, micro_batches, chunks_of(name, chunks), times, memory_limit)
    multiple = family.multiple(stages)
    if not _is_count(micro_batches) or micro_batches < 1 or micro_batches % multiple:
        rule = f"{name} needs at least 1"
        if multiple > 1:
            rule = f"{name} on {stages} ranks needs a multiple of {multiple}"
        raise ConfigError("micro_batches", micro_batches, rule, f"try {_nearest(micro_batches, multiple)}")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError("pipeline.memory_limit", memory_limit, "it counts activations and is more than 0")
    plan = family.make(sizes)
    if memory_limit is not None and not family.keeps_limit:
        peak = max(verify(plan).activations)
        if peak > memory_limit + 1e-9:
            rule = f"{name} with {micro_batches} micro-batches on {stages} ranks holds {peak:g} activations"
            hint = f"allow {peak:g}, or use 'dualpipe_interleaved' or 'wave', which keep to a limit"
            raise ConfigError("pipeline.memory_limit", memory_limit, rule, hint)
    return plan


def placement_of(name: str, stages: int, chunks: int = 1) -> Placement:
    """Where the stages of a schedule lie: for each direction the list stage -> rank.

    Args:
        stages: P, the number of pipeline ranks.
        chunks: as in the config; see `chunks_of`.

    Raises:
        ConfigError: the schedule does not exist, or not on so many ranks or with so many chunks.
    """
    return _family(name, stages, chunks).place(stages, chunks_of(name, chunks))


def chunks_of(name: str, chunks: int = 1) -> int:
    """Stages of one direction on each rank, for the number in the config; 1 there leaves it to the schedule.

    Raises:
        ConfigError: the schedule does not exist, or cannot have so many.
    """
    family = _known(name)
    if not _is_count(chunks) or chunks < 1:
        rule = "every rank holds at least one stage of a direction"
        raise ConfigError("pipeline.chunks", chunks, rule, "set it to 1")
    if family.chunks is None:
        return max(chunks, family.least_chunks)
    if chunks not in (1, family.chunks):
        rule = f"{name} has {family.chunks} stage{'s' * (family.chunks > 1)} of each direction on a rank"
        raise ConfigError("pipeline.chunks", chunks, rule, f"set it to {family.chunks}")
    return family.chunks


def _known(name: str) -> _Family:
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise ConfigError("pipeline.schedule", name, f"no such schedule; known: {', '.join(map(repr, NAMES))}", hint)
    return _FAMILIES[name]


def _family(name: str, stages: int, chunks: int) -> _Family:
    family = _known(name)
    chunks_of(name, chunks)
    step = 2 if family.even else 1
    if not _is_count(stages) or stages < step or stages % step:
        rule = "needs at least 1"
        if family.even:
            rule = "runs from both ends and needs an even number of stages, at least 2"
        raise ConfigError("pipeline.stages", stages, f"{name} {rule}", f"try {_nearest(stages, step)}")
    return family


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _nearest(value: object, multiple: int) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not multiple < value < math.inf:
        return str(multiple)
    below = multiple * math.floor(value / multiple)
    return f"{below} or {below + multiple}"
