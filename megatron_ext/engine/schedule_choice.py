"""The plan of a training step; under "auto", the one that is best for what the job itself was measured to take.

With `"schedule": "auto"` the first step warms up, the next MEASURED steps run a safe schedule of the placement that was
built and time every computation, then rank 0 chooses (pipeline/choice.py), all ranks follow, and the next step runs the
choice. It is kept in checkpoints, so that a resumed job neither measures nor switches.

`"trace": "folder"` writes what ran, per rank, in the format of pipeline/trace.py, on the first steps and then on those
that `steps_per_print` picks.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megatron_ext.comm.messages import Key
from megatron_ext.pipeline import choice
from megatron_ext.pipeline.choice import Choice
from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.measured import Durations, add_durations, measured_times
from megatron_ext.pipeline.schedules import schedule
from megatron_ext.pipeline.simulator import Times
from megatron_ext.pipeline.timeline import Span
from megatron_ext.pipeline.trace import write_rank_trace
from megatron_ext.pipeline.verifier import verify

MEASURED = 3  # steps; the median over them and over micro-batches stands against the odd slow one
TRACED = 3  # steps from the start that are traced
PINGS = 9  # messages there and back, of which the median counts


class ScheduleMixin:
    """The part of the engine that knows the plan of a step."""

    def _start_schedule(self) -> None:
        pipeline = self.section.pipeline
        self._plans: dict[tuple[str, int], Plan] = {}
        self._choice: Choice | None = None
        self._auto = "auto" in (pipeline.schedule, self.module.schedule)
        self._durations: Durations = defaultdict(list)
        self._steps_run = 0
        self._clock_offset = time.time() - time.perf_counter()  # hosts agree on the time of day, if on anything
        # Whatever cannot be made is refused now, not in the first step.
        self.plan()

    @property
    def schedule(self) -> str:
        """The name of the schedule that runs now."""
        if not self._auto:
            return self.module.schedule
        if self._choice is not None:
            return self._choice.name
        return choice.start(self.module.num_stages, self._total(), self.module.placement, self.module.chunks,
                            self.section.pipeline.memory_limit)

    def _total(self, micro_batches: int | None = None) -> int:
        """m: micro-batches of a pipeline, of all its directions together."""
        return self.process_groups.topology.directions * (micro_batches or self.gradient_accumulation_steps())

    def plan(self, micro_batches: int | None = None) -> Plan:
        """The schedule of a training step of n = `micro_batches` per direction (`gradient_accumulation_steps`).

        Raises:
            ConfigError: the schedule cannot have these sizes.
        """
        key = ("training", self._total(micro_batches))
        if key not in self._plans:
            times = self._choice.times if self._choice is not None else None
            with choice.in_the_config(self.process_groups.topology.directions):
                plan = schedule(self.schedule, self.module.num_stages, key[1], times, self.module.chunks,
                                self.section.pipeline.memory_limit)
            verify(plan)
            self._plans[key] = plan
        return self._plans[key]

    # -- measuring

    def _measuring(self) -> bool:
        return self._auto and self._choice is None and self._steps_run > 0

    def _wants_trace(self) -> bool:
        every = self.steps_per_print()
        return self.section.pipeline.trace is not None and (
            self.global_steps < TRACED or (bool(every) and (self.global_steps + 1) % every == 0))

    def _after_step(self, plan: Plan, spans: list[Span]) -> None:
        """Keeps what a recorded step has shown; chooses when there is enough of it."""
        self._steps_run += 1
        if spans and self.section.pipeline.trace is not None:
            grid, folder = self.process_groups.topology, Path(self.section.pipeline.trace)
            if grid.replicas > 1:
                folder /= f"replica_{grid.replica(self.process_groups.rank)}"
            write_rank_trace(folder, self.global_steps, self.module.stage_rank, spans, plan, self._clock_offset)
        if not (spans and self._auto and self._choice is None):
            return
        add_durations(self._durations, spans)
        if self._steps_run > MEASURED:
            self._choose()

    def _choose(self) -> None:
        """Rank 0 puts together what all have measured, and chooses; collective."""
        control, rank = self.process_groups.control, self.process_groups.rank
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (dict(self._durations), self._time_messages()), group=control)
        chosen: list[Any] = [None]
        if rank == 0:
            grid = self.process_groups.topology
            seen: Durations = defaultdict(list)
            for durations, _ in found:
                for key, values in durations.items():
                    seen[key].extend(values)
            times = measured_times(seen, grid.total_stages, self.module.chunks, max(ping for _, ping in found))
            chosen = [choice.choose(times, grid.stages, self._total(), self.module.placement, self.module.chunks,
                                    self.section.pipeline.memory_limit, self.module.bounds[-1])]
        dist.broadcast_object_list(chosen, src=0, group=control)
        self._follow(chosen[0])
        deepspeed.utils.log_dist(f"schedule: {self._choice.why}\n{table(self._choice)}", ranks=[0])

    def _follow(self, chosen: Choice) -> None:
        """Runs this schedule from the next step on."""
        self._choice = chosen
        self._plans.clear()
        self._durations.clear()

    def _choice_state(self) -> dict[str, Any] | None:
        """The choice as a checkpoint keeps it."""
        return None if self._choice is None else {"name": self._choice.name, "times": asdict(self._choice.times)}

    def _restore_choice(self, state: dict[str, Any] | None) -> None:
        """Runs what the checkpoint's job had chosen; a job that names its schedule is not overruled."""
        if state is not None and self._auto:
            self._follow(Choice(state["name"], Times(**state["times"]), (), None))

    def _time_messages(self) -> float:
        """Seconds that an activation takes to the next rank, with header and all; on ranks without a neighbour 0."""
        grid, messenger = self.process_groups.topology, self.executor.messenger
        place, me = grid.placement[0], self.module.stage_rank
        if grid.stages < 2:
            return 0.0
        stage = place.index(me)
        first = stage - stage % 2  # ranks talk in twos, so that nobody waits for a third
        if first + 1 >= grid.stages:
            return 0.0
        there, back = Key("F", 0, first, 0), Key("B", 0, first + 1, 0)
        peer = grid.rank_of(place[first + 1 if stage == first else first], grid.replica(self.process_groups.rank))
        payload = torch.empty(messenger.largest, dtype=torch.uint8, device=self.device)
        samples = []
        for _ in range(PINGS):
            messenger.expect([(back if stage == first else there, peer)])
            began = time.perf_counter()
            if stage == first:
                messenger.send(there, peer, payload)
                messenger.receive(back, peer)
            else:
                messenger.receive(there, peer)
                messenger.send(back, peer, payload)
            samples.append((time.perf_counter() - began) / 2)
        messenger.finish()
        return statistics.median(samples)


def table(chosen: Choice) -> str:
    """The schedules considered, a line each."""
    rows = [f"{'schedule':24s}{'weights':>8s}{'step [ms]':>11s}{'activations':>13s}"]
    for c in chosen.candidates:
        name = c.name + (f" x{c.chunks}" if c.chunks > 1 else "")
        mark = "*" if c.built and c.name == chosen.name else " "
        numbers = f"{1000 * c.makespan:11.1f}{c.peak:13g}" if c.makespan is not None else f"  {c.reason}"
        rows.append(f"{mark}{name:23s}{c.weights:7d}x{numbers}" + ("" if c.built else "   (another placement)"))
    return "\n".join(rows)
