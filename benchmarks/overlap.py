"""A training step with the all-to-all of experts behind computation, and the same step with both one after the other.

Eight ranks over gloo on this machine: P=4, EP=2. A block's computations sleep (emulation/), its tokens go through the
library's own dispatch and combine, and each exchange takes as long as a slow link would: a wrapper holds a wait back
until the transfer's time has passed since its start, one transfer after the other. In the first contest an all-to-all
takes as long as a phase, in the second a tenth of it. Steps with and without overlap take turns in one run. Reported:
the step with overlap against without and against the makespan simulated from the phases (pipeline/phases.py), and how
much of the communication in pairs is hidden, by the recorded pairs: whatever one takes beyond its computations counts
as exposed, the host's own time too. In the third contest the sum of gradients over replicas is slow too, REDUCTION
for every bucket, and steps in which a stage's gradients set off when it is done take turns with others that wait for
the end.

    python benchmarks/overlap.py --json runs/benchmarks/overlap.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from emulation import WIDTH, Clock, Layer, Seconds, run_ranks, time_pipeline

STAGES, EXPERT_PARALLEL, MICRO_BATCHES, BLOCKS = 4, 2, 16, 2  # a direction has half of the micro-batches
PHASE = 0.050  # of every computation of a block, in seconds
LATENCY = 0.0005
REDUCTION = 0.1
TOKENS, EXPERTS = 8, 4


@dataclass(frozen=True)
class Contest:
    """How long an all-to-all takes, in phases, and what is to hold."""

    name: str
    ratio: float
    slower: float  # at least, without overlap
    hidden: float | None = None  # share of the communication in pairs
    simulated: float | None = None  # how far from the makespan, at most
    reduction: bool = False  # on and off are about the reduction of gradients


CONTESTS = [Contest("all-to-all as long as a phase", 1.0, 1.25, 0.9, 0.1),
            Contest("all-to-all a tenth of a phase", 0.1, 0.98),
            Contest("gradients reduced behind the drain", 0.1, 1.0, reduction=True)]


class SlowLink:
    """Makes exchanges take longer: a wait ends no sooner than a slow link would have brought what it waits for.

    Args:
        transfer: seconds of an all-to-all, of a link that carries one at a time; the counts take LATENCY.
    """

    def __init__(self, transfer: float):
        from megatron_ext.comm.exchange import Line, UnderWay

        self.transfer, self.free = transfer, 0.0
        self.start, self.gather, self.wait = Line.start, Line.gather, UnderWay.wait
        Line.start, Line.gather, UnderWay.wait = (  # type: ignore[method-assign]
            lambda *a, **k: self.slow(self.start(*a, **k), self.transfer),
            lambda *a, **k: self.slow(self.gather(*a, **k), LATENCY), lambda way: self.late(way))

    def slow(self, way: Any, seconds: float) -> Any:
        begins = max(self.free, time.perf_counter()) if seconds == self.transfer else time.perf_counter()
        way.until = begins + seconds
        if seconds == self.transfer:
            self.free = way.until
        return way

    def late(self, way: Any) -> Any:
        found = self.wait(way)
        time.sleep(max(0.0, way.until - time.perf_counter()))
        return found


def slow_reduction() -> None:
    """Makes the sums of gradients over replicas take longer, one after the other."""
    from megatron_ext.engine import reduction

    class Slow:
        free = 0.0

        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def all_reduce(self, *args: Any, **kwargs: Any) -> Any:
            self.free = max(self.free, time.perf_counter()) + REDUCTION
            return _Late(dist.all_reduce(*args, **kwargs), self.free)

    reduction.dist = Slow()  # type: ignore[attr-defined]


class _Late:
    def __init__(self, work: Any, until: float):
        self.work, self.until = work, until

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.until - time.perf_counter()))


class Block(nn.Module):
    """Attention, dispatch, experts, combine: two emulated computations, and the library's way of tokens between."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.attention, self.mlp = (Layer(Seconds(PHASE, PHASE, PHASE), clock) for _ in range(2))
        self.dispatcher: Any = None

    def set_expert_parallel(self, ep: Any) -> None:
        from megatron_ext.comm.dispatch import Dispatcher

        self.dispatcher = Dispatcher(EXPERTS, ep)

    def phases(self) -> list[Any]:
        from megatron_ext.layers.expert_phases import Combine, Dispatch
        from megatron_ext.layers.phases import Phase

        experts = torch.arange(TOKENS)[:, None].add(torch.arange(2)).remainder(EXPERTS)

        def attention(_: Any, x: Tensor) -> tuple[Tensor, ...]:
            y = self.attention(x)
            return y, y * 1, torch.full((TOKENS, 2), 0.5), experts

        return [Phase("attention", ("x",), ("residual", "tokens", "weights", "experts"), attention),
                Dispatch(self.dispatcher), Phase("mlp", ("rows.0",), ("results.0",), lambda _, rows: self.mlp(rows)),
                Combine(self.dispatcher), Phase("sum", ("residual", "mixed"), ("x",), lambda _, a, b: a + b)]


def build(clock: Clock) -> Any:
    from deepspeed.pipe import LayerSpec

    import megatron_ext

    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_BATCHES // 2,
              "steps_per_print": 10**6, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
              "megatron_ext": {"pipeline": {"stages": STAGES, "schedule": "dualpipe"},
                               "expert_parallel": {"size": EXPERT_PARALLEL}}}
    layers = [LayerSpec(Block, clock) for _ in range(STAGES * BLOCKS)]
    model = megatron_ext.PipelineModule(layers=layers, loss_fn=nn.functional.mse_loss, partition_method="uniform",
                                        config=config)
    return megatron_ext.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def measure(rank: int, contest: Contest, steps: int) -> dict[str, Any]:
    """One rank: seconds of steps with and without overlap, of recorded pairs, and the simulated makespan."""
    from megatron_ext.pipeline import Pair, simulate
    from megatron_ext.pipeline.comparison import times_of_run
    from megatron_ext.pipeline.phases import Phases

    SlowLink(contest.ratio * PHASE)
    if contest.reduction:
        slow_reduction()
    engine = build(Clock())
    alone = time_pipeline(engine)
    data = itertools.repeat((torch.full((TOKENS, WIDTH), float(rank)), torch.ones(TOKENS, WIDTH)))
    found: dict[str, Any] = {"on": [], "off": [], "whole on": [], "whole off": [], "pairs": []}
    messages = []
    for turn in range(steps + 1):
        for name in ("on", "off"):
            if contest.reduction:
                engine.reduction.early = name == "on"
            else:
                engine.executor.overlap = name == "on"
            dist.barrier()
            began = time.perf_counter()
            engine.train_batch(data)
            seconds = torch.tensor([alone[0], time.perf_counter() - began])
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if turn:  # the first does not count
                found[name].append(seconds[0].item())
                found[f"whole {name}"].append(seconds[1].item())
    if contest.reduction:
        return found
    engine.executor.overlap = True
    for _ in range(3):
        engine.record_next_batch()
        dist.barrier()
        engine.train_batch(data)
        spans = [span for line in engine.timeline.ranks for span in line if isinstance(span.instruction, Pair)]
        found["pairs"] += [span.end - span.start for span in spans if span.instruction.backward.kind == "B"]
        messages.append(times_of_run(engine.plan(), engine.timeline).message)
    phases = Phases(PHASE, contest.ratio * PHASE, PHASE, contest.ratio * PHASE, blocks=BLOCKS)
    found["message"] = statistics.median(messages)
    found["simulated"] = simulate(engine.plan(), phases.times(found["message"])).makespan
    found["timeline"] = engine.timeline.to_json()
    return found


def rows(contest: Contest, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    on, off, whole_on, whole_off = (statistics.median(found[name]) for name in ("on", "off", "whole on", "whole off"))
    size = f"P={STAGES}, EP={EXPERT_PARALLEL}, m={MICRO_BATCHES}, {contest.name}"

    def row(name: str, value: float, peer: str, peer_value: float, goal: str, holds: bool | None) -> dict[str, Any]:
        return {"name": f"{name}, {size}", "value": 1000 * value, "unit": "ms", "peer": peer,
                "peer_value": 1000 * peer_value, "ratio": peer_value / value, "goal": goal, "holds": holds}

    goal, holds = f"{contest.slower} or more", whole_off / whole_on >= contest.slower
    if contest.reduction:
        yield row("whole step", whole_on, "reduced at the end", whole_off, goal, holds)
        return
    yield row("pipeline with overlap", on, "without", off, "none", None)
    yield row("whole step with overlap", whole_on, "without", whole_off, goal, holds)
    within, simulated = contest.simulated, found["simulated"]
    yield row("whole step with overlap", whole_on, f"simulated, message {1000 * found['message']:.2f} ms", simulated,
              f"within {within:.0%}" if within else "none", abs(whole_on / simulated - 1) <= within if within else None)
    computed = 6 * PHASE * BLOCKS
    communication = 4 * contest.ratio * PHASE * BLOCKS
    exposed = statistics.fmean(found["pairs"]) - computed
    yield {"name": f"communication in pairs that is hidden, {size}", "value": 1 - exposed / communication,
           "unit": "share", "peer": "of milliseconds in a pair", "peer_value": 1000 * communication, "ratio": None,
           "goal": f"{contest.hidden} or more" if contest.hidden else "none",
           "holds": 1 - exposed / communication >= contest.hidden if contest.hidden else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5, help="of either kind, that count")
    parser.add_argument("--picture", type=Path, help="draw a recorded step of the first contest here")
    args = parser.parse_args()
    table = []
    for contest in CONTESTS:
        found = run_ranks(measure, STAGES * EXPERT_PARALLEL, contest, args.steps)
        table += rows(contest, found)
        if args.picture and contest is CONTESTS[0]:
            from megatron_ext.pipeline import Timeline, draw

            draw(Timeline.from_json(found["timeline"]), args.picture, title="dualpipe with overlap, as it ran")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        ratio = "" if row["ratio"] is None else f"; {row['ratio']:.3f}"
        print(f"{row['name']}: {row['value']:.3f} {row['unit']}; {row['peer']} {row['peer_value']:.0f}{ratio} "
              f"({row['goal']})" + {True: "", False: "  MISSED", None: ""}[row["holds"]])


if __name__ == "__main__":
    main()
