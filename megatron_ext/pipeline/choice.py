"""Which schedule is best for measured times: every one that the placement allows is made, simulated and compared.

A pure function of its arguments, so that all ranks agree once rank 0's times are broadcast. Schedules of other
placements are simulated too, with the same number of micro-batches per pipeline (the same global batch): they cannot
be switched to, for the placement is fixed when the module is built, but they can be named for the next start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_ext.config.errors import ConfigError
from megatron_ext.parallel import placement as places
from megatron_ext.parallel.placement import Placement
from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.schedules import NAMES, placement_of, schedule
from megatron_ext.pipeline.simulator import Times, simulate

PLACEMENTS = {"bidirectional": places.bidirectional, "ring": places.ring, "wave": places.wave}
"""What `pipeline.placement` may say beside "auto"."""

_SAFE = ("dualpipe", "dualpipev", "interleaved_paired", "dualpipe_interleaved", "wave")
"""What to measure with: the first of these that has the placement and fits. All have pairs, for only in one can be seen
how long it takes."""

_OTHERS = (("zb_h1", 1), ("zbv", 1), ("wave", 2), ("wave", 4), ("dualpipe_zb", 1), ("dualpipe_interleaved", 2),
           ("dualpipe_interleaved", 4))
"""What may be better in another placement; with more than 4 chunks the cost of each, not modelled, would show."""

ALIKE = 0.01
"""Schedules this close to the shortest count as equally long, for measured times are no better; memory decides."""

WORTH = 0.02
"""A schedule of another placement is named from this gain on."""


@contextmanager
def in_the_config(directions: int = 1) -> Iterator[None]:
    """Errors of schedules under the names that a ds_config has for their sizes, counted as it counts them.

    Args:
        directions: over which `micro_batches` are spread.
    """
    try:
        yield
    except ConfigError as error:
        if error.key == "micro_batches":
            each = f" in {directions} directions" if directions > 1 else ""
            raise ConfigError("gradient_accumulation_steps", error.value // directions,
                              f"makes {error.value} micro-batches{each}, and {error.rule}",
                              error.hint and error.hint + (" micro-batches" if each else "")) from None
        key = f"megatron_ext.{error.key}" if error.key.startswith("pipeline.") else error.key
        raise ConfigError(key, error.value, error.rule, error.hint) from None


@dataclass(frozen=True)
class Candidate:
    """A schedule that was considered.

    Attributes:
        built: it has the placement of the module; else it would need another start.
        makespan, peak: simulated step in the unit of the times, and activations on the rank that holds most; None if
            the schedule cannot have these sizes.
        reason: why not; empty if it can.
        weights: copies of the model that a pipeline holds.
    """

    name: str
    chunks: int
    built: bool
    makespan: float | None
    peak: float | None
    reason: str
    weights: int


@dataclass(frozen=True)
class Choice:
    """The schedule to run from now on, and what it was chosen from; `elsewhere` names a better one to start with."""

    name: str
    times: Times
    candidates: tuple[Candidate, ...]
    elsewhere: Candidate | None

    @property
    def why(self) -> str:
        """One sentence."""
        built = {c.name: c.makespan for c in self.candidates if c.built and c.makespan is not None}
        if not built:
            return f"{self.name}, as the checkpoint has it"
        mine, shortest = built[self.name], min(built.values())
        said = f"{self.name} has the shortest step of the {len(built)} schedules that fit this placement"
        if mine > shortest:
            said = (f"{self.name} holds least of the schedules within {ALIKE:.0%} of the shortest step that fit this "
                    "placement")
        others = sorted(length for name, length in built.items() if name != self.name)
        if others and mine > 0 and others[0] > mine:
            said += f", {others[0] / mine - 1:.1%} before the next"
        if self.elsewhere is not None and self.elsewhere.makespan is not None:
            chunks = f" and chunks {self.elsewhere.chunks}" if self.elsewhere.chunks > 1 else ""
            said += (f"; for the next start, schedule {self.elsewhere.name!r}{chunks} would be "
                     f"{1 - self.elsewhere.makespan / mine:.1%} shorter ({self.elsewhere.weights}x weights)")
        return said


def start(stages: int, micro_batches: int, placement: Placement, chunks: int, memory_limit: float | None) -> str:
    """The name of a safe schedule of this placement, to measure with.

    Raises:
        ConfigError: none of them can have these sizes within the limit; the error of the last one tried.
    """
    error: ConfigError | None = None
    for name in _SAFE:
        try:
            if placement_of(name, stages, chunks) == placement:
                schedule(name, stages, micro_batches, chunks=chunks, memory_limit=memory_limit)
                return name
        except ConfigError as refused:
            error = refused
    assert error is not None, placement
    raise error


def choose(times: Times, stages: int, micro_batches: int, placement: Placement, chunks: int,
           memory_limit: float | None = None, layers: int | None = None) -> Choice:
    """The schedule with the shortest simulated step; of those within ALIKE of it, the one that holds least.

    Args:
        times: measured, of a rank's whole share of the model.
        stages: P.
        micro_batches: m of a pipeline, of all its directions together.
        placement: what was built; `chunks` of each direction on a rank.
        memory_limit: activations that a rank may hold; None leaves every schedule what it takes by itself.
        layers: of the model, which cannot be cut into more stages.

    Raises:
        ConfigError: no schedule of the placement fits the limit.
    """
    found = []
    for name in NAMES:
        try:
            if placement_of(name, stages, chunks) != placement:
                continue
        except ConfigError:
            continue
        found.append(_candidate(name, chunks, True, times, stages, micro_batches, memory_limit))
    best = _best(found)
    if best is None or best.makespan is None:
        raise ConfigError("megatron_ext.pipeline.memory_limit", memory_limit,
                          "no schedule of this placement fits: " + "; ".join(f"{c.name}: {c.reason}" for c in found))
    for name, count in _OTHERS:
        try:
            other = placement_of(name, stages, count)
        except ConfigError:
            continue
        if other != placement and (layers is None or len(other[0]) <= layers):
            found.append(_candidate(name, count, False, times, stages, micro_batches, memory_limit))
    elsewhere = _best([c for c in found if not c.built])
    if elsewhere is not None and elsewhere.makespan is not None and elsewhere.makespan > (1 - WORTH) * best.makespan:
        elsewhere = None
    return Choice(best.name, times, tuple(found), elsewhere)


def make(choice: Choice, stages: int, micro_batches: int, chunks: int, memory_limit: float | None) -> Plan:
    """The plan of a choice."""
    return schedule(choice.name, stages, micro_batches, choice.times, chunks, memory_limit)


def _candidate(name: str, chunks: int, built: bool, times: Times, stages: int, micro_batches: int,
               memory_limit: float | None) -> Candidate:
    weights = len(placement_of(name, stages, chunks))
    try:
        plan = schedule(name, stages, micro_batches, times, chunks, memory_limit)
    except ConfigError as error:
        return Candidate(name, chunks, built, None, None, error.rule, weights)
    result = simulate(plan, times)
    peak = max(result.peak_activations)
    if memory_limit is not None and peak > memory_limit + 1e-9:
        return Candidate(name, chunks, built, None, peak, f"holds {peak:g} activations", weights)
    return Candidate(name, chunks, built, result.makespan, peak, "", weights)


def _best(candidates: list[Candidate]) -> Candidate | None:
    lengths = [c.makespan for c in candidates if c.makespan is not None]
    alike = [c for c in candidates if c.makespan is not None and c.makespan <= (1 + ALIKE) * min(lengths)]
    return min(alike, key=lambda c: c.peak or 0.0, default=None)
