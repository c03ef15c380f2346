"""The plan of a training step; under "auto", the one that is best for what the job itself was measured to take.

With `"schedule": "auto"` the first step warms up, the next MEASURED steps run a safe schedule of the placement that was
built and time every computation, then rank 0 chooses (pipeline/choice.py), all ranks follow, and the next step runs the
choice. It is kept in checkpoints, so that a resumed job neither measures nor switches.

`"trace": "folder"` writes what ran, per rank, in the format of pipeline/trace.py, on the first steps, on the first
after a switch, and on those that `steps_per_print` picks.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.comm.messages import Key
from megatron_ext.config import ConfigError
from megatron_ext.parallel import agreed
from megatron_ext.pipeline import choice
from megatron_ext.pipeline.choice import Choice
from megatron_ext.pipeline.executor import Outcome
from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.measured import Durations, add_durations, add_weight_grads, measured_times
from megatron_ext.pipeline.schedules import schedule
from megatron_ext.pipeline.simulator import Times
from megatron_ext.pipeline.trace import write_rank_trace
from megatron_ext.pipeline.verifier import verify

MEASURED = 3  # steps; the median over them and over micro-batches stands against the odd slow one
TRACED = 3  # steps that are traced from the start, and from a switch
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
        self._trace_until = TRACED
        self._clock_offset = time.time() - time.perf_counter()  # hosts agree on the time of day, if on anything
        self.plan()  # what cannot be made is refused now, not in the first step

    @property
    def schedule(self) -> str:
        """The name of the schedule that runs now."""
        return self.plan().name

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
            with choice.in_the_config(self.process_groups.topology.directions):
                plan = self._make_plan(key[1])
            verify(plan)
            self._plans[key] = plan
        return self._plans[key]

    def _make_plan(self, total: int) -> Plan:
        module, limit = self.module, self.section.pipeline.memory_limit
        if not self._auto:
            return schedule(module.schedule, module.num_stages, total, None, module.chunks, limit)
        if self._choice is None:
            return choice.start(module.num_stages, total, module.placement, module.chunks, limit)
        times = self._choice.times
        try:
            return schedule(self._choice.name, module.num_stages, total, times, module.chunks, limit)
        except ConfigError as error:  # other sizes than it was chosen for
            other = choice.choose(times, module.num_stages, total, module.placement, module.chunks, limit).name
            self._say(f"{self._choice.name} no longer fits ({error}); now {other}")
            return schedule(other, module.num_stages, total, times, module.chunks, limit)

    # -- measuring

    def _measuring(self) -> bool:
        """Whether a choice is still to be made."""
        return self._auto and self._choice is None

    def _wants_trace(self) -> bool:
        every = self.steps_per_print()
        return self.section.pipeline.trace is not None and (
            self.global_steps < self._trace_until or (bool(every) and (self.global_steps + 1) % every == 0))

    def _after_step(self, plan: Plan, outcome: Outcome) -> None:
        """Keeps what a recorded step has shown; chooses when there is enough of it."""
        self._steps_run += 1
        if outcome.spans and self._measuring() and self._steps_run > 1:  # the first one warms up
            add_durations(self._durations, outcome.spans)
            add_weight_grads(self._durations, outcome.weight_grads)
        if self._measuring() and self._steps_run > MEASURED:
            self._choose()
        if outcome.spans and self.section.pipeline.trace is not None:
            grid, folder = self.process_groups.topology, Path(self.section.pipeline.trace)
            if grid.replicas > 1:
                folder /= f"replica_{grid.replica(self.process_groups.rank)}"
            write_rank_trace(folder, self.global_steps, self.module.stage_rank, outcome.spans, plan,
                             self._clock_offset, more={"expert_traffic": self.expert_traffic})

    def _choose(self) -> None:
        """Rank 0 puts together what all have measured, and chooses; collective."""
        self._say("choosing by what was measured")
        control, grid, module = self.process_groups.control, self.process_groups.topology, self.module
        found: list[Any] = [None] * dist.get_world_size()
        paired = any(module.paired_step(stage) is not None or (self.executor.overlap and module.overlaps(stage))
                     for stage in module.stages)
        dist.all_gather_object(found, (dict(self._durations), self._time_messages(), paired), group=control)
        chosen: list[Any] = [None]
        with agreed(control), choice.in_the_config(grid.directions):
            if self.process_groups.rank == 0:
                seen: Durations = defaultdict(list)
                for durations, _, _ in found:
                    for key, values in durations.items():
                        seen[key].extend(values)
                message = statistics.median([ping for _, ping, _ in found if ping is not None] or [0.0])
                times = measured_times(seen, grid.total_stages, module.chunks, message,
                                       paired=any(pairs for _, _, pairs in found))
                best = choice.choose(times, grid.stages, self._total(), module.placement, module.chunks,
                                     self.section.pipeline.memory_limit, module.bounds[-1])
                self._follow(best)
                chosen = [(best, self.plan())]  # with the plan: to search for an order once more takes seconds
        dist.broadcast_object_list(chosen, src=0, group=control)
        self._follow(chosen[0][0])
        self._plans["training", self._total()] = chosen[0][1]
        self._say(f"{chosen[0][0].why}\n{table(chosen[0][0])}")

    def _say(self, text: str) -> None:
        """Once for the job, and not through DeepSpeed's logger, which keeps what is not a warning to itself."""
        if self.process_groups.rank == 0:
            print(f"megatron_ext: schedule: {text}", flush=True)

    def _follow(self, chosen: Choice) -> None:
        """Runs this schedule from the next step on."""
        self._trace_until = self.global_steps + TRACED
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
            self.plan()  # now, for sizes may have changed since

    def _time_messages(self) -> float | None:
        """Seconds that an activation takes to the next rank, with header and all; None on ranks without a neighbour."""
        grid, messenger = self.process_groups.topology, self.executor.messenger
        place, me = grid.placement[0], self.module.stage_rank
        stage = place.index(me)
        first = stage - stage % 2  # ranks talk in twos, so that nobody waits for a third
        if first + 1 >= grid.stages:
            return None
        there, back = Key("F", 0, first, 0), Key("B", 0, first + 1, 0)
        peer = grid.rank_of(place[first + 1 if stage == first else first], grid.replica(self.process_groups.rank))
        synchronize = self.executor.synchronize
        payload = torch.empty(messenger.largest, dtype=torch.uint8, device=self.device)
        samples = []
        for _ in range(PINGS):
            messenger.expect([(back if stage == first else there, peer)])
            synchronize()
            began = time.perf_counter()
            if stage == first:
                messenger.send(there, peer, payload)
                messenger.receive(back, peer)
            else:
                messenger.receive(there, peer)
                messenger.send(back, peer, payload)
            synchronize()  # what NCCL has received is only ordered on the device's stream so far
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
