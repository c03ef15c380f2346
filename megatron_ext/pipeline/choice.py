"""Which schedule is best for measured times: every one that the placement allows is made, simulated and compared.

A pure function of its arguments, so that all ranks agree once rank 0's times are broadcast. Schedules of other
placements are simulated too, with the same number of micro-batches per pipeline (the same global batch): they cannot
be switched to, for the placement is fixed when the module is built, but they can be named for the next start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from megatron_ext.config.errors import ConfigError, UserError
from megatron_ext.parallel import placement as places
from megatron_ext.parallel.placement import Placement
from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.schedules import NAMES, placement_of, schedule
from megatron_ext.pipeline.simulator import Times, simulate
from megatron_ext.pipeline.verifier import verify

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
        if mine > shortest:  # it holds less, for among equals the shorter is taken
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


def start(stages: int, micro_batches: int, placement: Placement, chunks: int, memory_limit: float | None) -> Plan:
    """A safe plan of this placement, to measure with.

    Raises:
        ConfigError: no schedule of the placement can have these sizes, or none fits the limit; names what would.
    """
    error: ConfigError | None = None
    names = _names_of(stages, placement, chunks)
    for name in sorted(names, key=lambda name: _SAFE.index(name) if name in _SAFE else len(_SAFE)):
        try:
            return schedule(name, stages, micro_batches, chunks=chunks, memory_limit=memory_limit)
        except ConfigError as refused:
            error = refused
    assert error is not None, placement
    raise error if memory_limit is None else _too_little(stages, micro_batches, placement, chunks, memory_limit)


def _names_of(stages: int, placement: Placement, chunks: int) -> list[str]:
    """The schedules of a placement."""
    found = []
    for name in NAMES:
        with suppress(ConfigError):
            if placement_of(name, stages, chunks) == placement:
                found.append(name)
    return found


def _too_little(stages: int, micro_batches: int, placement: Placement, chunks: int, limit: float) -> ConfigError:
    """That a limit is too tight for every schedule of a placement, and what the least of them holds."""
    least: list[tuple[float, str]] = []
    for name in _names_of(stages, placement, chunks):
        with suppress(ConfigError):
            if name in ("dualpipe_interleaved", "wave"):  # those can do with one micro-batch of each direction
                least.append((len(placement), name))
            else:
                plan = schedule(name, stages, micro_batches, chunks=chunks)
                least.append((max(verify(plan).activations), name))
    peak, name = min(least)
    return ConfigError("pipeline.memory_limit", limit, f"no schedule of this placement on {stages} ranks holds so few "
                       "activations", f"allow {peak:g} ({name})")


def choose(times: Times, stages: int, micro_batches: int, placement: Placement, chunks: int,
           memory_limit: float | None = None, layers: int | None = None) -> Choice:
    """The schedule with the shortest simulated step; of those within ALIKE of it, the one that holds least.

    Args:
        times: measured, of a rank's whole share of the model.
        stages: P.
        micro_batches: m of a pipeline, of all its directions together.
        placement: what was built; `chunks` of each direction on a rank.
        memory_limit: activations that a rank may hold; if None, P+1, as DualPipe, or what the schedule to start with
            holds if that is more.
        layers: of the model, which cannot be cut into more stages.

    Raises:
        ConfigError: no schedule of the placement fits the limit.
    """
    first = start(stages, micro_batches, placement, chunks, memory_limit)
    sizes = _Sizes(times, stages, micro_batches, memory_limit, max(stages + 1, *verify(first).activations))
    found = [_candidate(name, chunks, True, sizes) for name in _names_of(stages, placement, chunks)]
    best = _best(found)
    assert best is not None and best.makespan is not None, "the first one fits"
    for name, count in _OTHERS:
        try:
            other = placement_of(name, stages, count)
        except ConfigError:
            continue
        if other != placement and (layers is None or len(other[0]) <= layers):
            found.append(_candidate(name, count, False, sizes))
    elsewhere = _best([c for c in found if not c.built])
    if elsewhere is not None and elsewhere.makespan is not None and elsewhere.makespan > (1 - WORTH) * best.makespan:
        elsewhere = None
    return Choice(best.name, times, tuple(found), elsewhere)


@dataclass(frozen=True)
class _Sizes:
    """What candidates are made for; `usual` is what a rank may hold where no limit is given."""

    times: Times
    stages: int
    micro_batches: int
    memory_limit: float | None
    usual: float


def _candidate(name: str, chunks: int, built: bool, sizes: _Sizes) -> Candidate:
    weights = len(placement_of(name, sizes.stages, chunks))
    try:
        plan = schedule(name, sizes.stages, sizes.micro_batches, sizes.times, chunks, sizes.memory_limit)
    except ConfigError as error:
        return Candidate(name, chunks, built, None, None, error.rule, weights)
    except UserError as error:  # an order that was searched for and is not sound: the others are still there
        return Candidate(name, chunks, built, None, None, str(error), weights)
    result = simulate(plan, sizes.times)
    peak = max(result.peak_activations)
    if sizes.memory_limit is None and peak > sizes.usual + 1e-9:
        reason = f"holds {peak:g} activations; set memory_limit to allow more than {sizes.usual:g}"
        return Candidate(name, chunks, built, None, peak, reason, weights)
    return Candidate(name, chunks, built, result.makespan, peak, "", weights)


def _best(candidates: list[Candidate]) -> Candidate | None:
    lengths = [c.makespan for c in candidates if c.makespan is not None]
    alike = [c for c in candidates if c.makespan is not None and c.makespan <= (1 + ALIKE) * min(lengths)]
    return min(alike, key=lambda c: (c.peak or 0.0, c.makespan or 0.0), default=None)
