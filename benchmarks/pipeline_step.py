"""One training step under DeepSpeed's 1F1B and DualPipeV, torch's ZBV, and schedules of ours, side by side.

Eight ranks over gloo on this machine; a rank's whole share of the model takes TIMES for forward, input gradient and
weight gradient by sleeping (emulation/), so that sharing cores does not matter. Two contests: pairs that gain
nothing, and pairs of 0.8 of their parts, which only an engine that runs forward and backward together can use. All
engines do the same work with the same number of micro-batches and take turns; figures are medians of whole
`train_batch` calls, optimizer step included, and for ours also of the pipeline alone, against the makespan simulated
with the message time measured in the same run: from the end of the computation that made a message to the start of the
one that had waited for nothing else, which on a busy host is longer than a ping (given beside it).

    python benchmarks/pipeline_step.py --json runs/benchmarks/pipeline_step.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from emulation import WIDTH, Clock, Layer, Seconds, run_ranks, time_pipeline

RANKS, MICRO_BATCHES = 8, 16
TIMES = Seconds(0.020, 0.020, 0.020)
PAIR = 0.048
RECORDED = 3  # steps from which the message time is taken


@dataclass(frozen=True)
class Ours:
    """A schedule of ours."""

    name: str
    chunks: int = 1

    def __str__(self) -> str:
        return self.name + (f", {self.chunks} chunks" if self.chunks > 1 else "")


CONTESTS = {
    "no overlap gain": (TIMES, [Ours("dualpipe"), Ours("zbv"), Ours("dualpipe_interleaved")], 1.25),
    "overlap gain": (replace(TIMES, pair=PAIR),
                     [Ours("dualpipe"), Ours("dualpipe_zb"), Ours("dualpipe_interleaved", 2), Ours("wave", 4)], 1.45),
}
"""The emulated times, our schedules, and how much faster than the better stock engine the best of them shall be."""
DUALPIPE_GOAL = 1.38  # with overlap gain

Step = Callable[[], float]
"""Runs one step; returns the seconds of the pipeline alone, or 0 if that cannot be told."""


def inputs() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, WIDTH), torch.ones(1, WIDTH)


def config(micro_batches_per_direction: int) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_batches_per_direction,
            "steps_per_print": 10**6, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def stock(module: str, stages: int, seconds: Seconds, clock: Clock) -> Step:
    """DeepSpeed's `PipelineModule` (1F1B) or `DualPipeVModule`, one layer a stage."""
    import deepspeed
    from deepspeed.pipe import LayerSpec

    layers = [LayerSpec(Layer, replace(seconds, pair=None).over(stages // RANKS), clock) for _ in range(stages)]
    model = getattr(deepspeed.pipe, module)(layers=layers, num_stages=RANKS, loss_fn=nn.functional.mse_loss,
                                            partition_method="uniform")
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()),
                                  config=config(MICRO_BATCHES))[0]
    data = itertools.repeat(inputs())

    def step() -> float:
        engine.train_batch(data)
        return 0.0

    return step


def torch_zbv(seconds: Seconds, clock: Clock) -> Step:
    """torch.distributed.pipelining's ScheduleZBVZeroBubble: two half-size stages on a rank."""
    from torch.distributed.pipelining import PipelineStage, ScheduleZBVZeroBubble

    rank = dist.get_rank()
    stages = []
    for number in (rank, 2 * RANKS - 1 - rank):
        layer = Layer(replace(seconds, pair=None).over(2), clock)
        stages.append(PipelineStage(layer, number, 2 * RANKS, torch.device("cpu")))
    schedule = ScheduleZBVZeroBubble(stages, MICRO_BATCHES, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD([p for stage in stages for p in stage.submod.parameters()], lr=0.1)
    x, target = (t.expand(MICRO_BATCHES, WIDTH).contiguous() for t in inputs())

    def step() -> float:
        if rank == 0:
            schedule.step(x.requires_grad_(), target=target)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    return step


PEERS: dict[str, Callable[[Seconds, Clock], Step]] = {
    "DeepSpeed 1F1B": lambda seconds, clock: stock("PipelineModule", RANKS, seconds, clock),
    "DeepSpeed DualPipeV": lambda seconds, clock: stock("DualPipeVModule", 2 * RANKS, seconds, clock),
    "torch ZBV": torch_zbv,
}


def ours(candidate: Ours, seconds: Seconds, clock: Clock) -> tuple[Step, Any]:
    """An engine of megatron_ext, one layer a stage; also the engine."""
    from deepspeed.pipe import LayerSpec

    import megatron_ext
    from megatron_ext.pipeline import Times, schedule
    from megatron_ext.pipeline.schedules import placement_of

    place = placement_of(candidate.name, RANKS, candidate.chunks)
    layers = [LayerSpec(Layer, seconds.over(len(place[0]) // RANKS), clock) for _ in range(len(place[0]))]
    model = megatron_ext.PipelineModule(layers=layers, num_stages=RANKS, loss_fn=nn.functional.mse_loss,
                                        partition_method="uniform", schedule=candidate.name, chunks=candidate.chunks)
    engine = megatron_ext.initialize(model=model, model_parameters=list(model.parameters()),
                                     config=config(MICRO_BATCHES // len(place)))[0]
    # What "auto" would do with times it has measured; here they are known.
    times = Times(seconds.forward, seconds.input_grad, seconds.weight_grad, seconds.pair)
    plan = schedule(candidate.name, RANKS, MICRO_BATCHES, times, candidate.chunks)
    engine.plan = lambda: plan
    alone = time_pipeline(engine)
    data = itertools.repeat(inputs())

    def step() -> float:
        engine.train_batch(data)
        return alone[0]

    return step, engine


def measure(rank: int, contest: str, name: str, steps: int) -> dict[str, Any]:
    """One rank of one engine, by its name in the table: seconds of each step, and of its pipeline alone."""
    from megatron_ext.pipeline import Times, simulate
    from megatron_ext.pipeline.comparison import times_of_run

    seconds, candidates, _ = CONTESTS[contest]
    clock, engine = Clock(), None
    if name in PEERS:
        step = PEERS[name](seconds, clock)
    else:
        [candidate] = [c for c in candidates if str(c) == name]
        step, engine = ours(candidate, seconds, clock)
    found: dict[str, Any] = {"whole": [], "alone": []}
    for turn in range(steps + 1):
        dist.barrier()
        began = time.perf_counter()
        pipeline = torch.tensor(step())
        dist.barrier()
        ended = time.perf_counter()
        dist.all_reduce(pipeline, op=dist.ReduceOp.MAX)
        if turn:  # the first does not count
            found["whole"].append(ended - began)
            found["alone"].append(pipeline.item())
    if engine is not None:
        pings: list[Any] = [None] * RANKS
        dist.all_gather_object(pings, engine._time_messages())
        messages = []
        for _ in range(RECORDED):
            engine.record_next_batch()
            dist.barrier()
            step()
            messages.append(times_of_run(engine.plan(), engine.timeline).message)
        message = statistics.median(messages)
        times = Times(seconds.forward, seconds.input_grad, seconds.weight_grad, seconds.pair, message)
        found |= {"ping": statistics.median(pings), "message": message,
                  "simulated": simulate(engine.plan(), times).makespan, "timeline": engine.timeline.to_json()}
    return found


def hold(contest: str, rounds: int, steps: int) -> dict[str, Any]:
    """All engines in turn, so many times, each in processes of its own: every process group of gloo has a thread that
    wakes 100 times a second, and nineteen of them on eight ranks, as all engines at once have, take an eighth of two
    cores."""
    names = [*PEERS, *map(str, CONTESTS[contest][1])]
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            parts[name].append(run_ranks(measure, RANKS, contest, name, steps))

    def middle(name: str, key: str) -> float:
        return statistics.median(itertools.chain.from_iterable(part[key] for part in parts[name]))

    found: dict[str, Any] = {key: {n: middle(n, key) for n in names} for key in ("whole", "alone")}
    for key in ("simulated", "message", "ping"):
        found[key] = {n: statistics.median(part[key] for part in parts[n]) for n in names if n not in PEERS}
    found["timeline"] = {n: parts[n][-1]["timeline"] for n in names if n not in PEERS}
    return found


def rows(contest: str, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ours against the better stock engine, torch's ZBV, and what the simulator foretells."""
    _, candidates, goal = CONTESTS[contest]
    whole = found["whole"]
    stock_name = min((n for n in whole if n.startswith("DeepSpeed")), key=lambda n: whole[n])
    best = min(map(str, candidates), key=lambda n: whole[n])
    size = f"P={RANKS}, m={MICRO_BATCHES}, {contest}"

    def row(name: str, value: float, peer: str, peer_value: float, goal: str, holds: bool | None) -> dict[str, Any]:
        return {"name": f"{name} step, {size}", "value": 1000 * value, "unit": "ms", "peer": peer,
                "peer_value": 1000 * peer_value, "ratio": peer_value / value, "goal": goal, "holds": holds}

    for peer in ("DeepSpeed 1F1B", "DeepSpeed DualPipeV", "torch ZBV"):
        yield row(f"best of ours ({best})", whole[best], peer, whole[peer],
                  f"{goal} or more" if peer == stock_name else "none",
                  whole[peer] / whole[best] >= goal if peer == stock_name else None)
    if contest == "overlap gain":
        ratio = whole[stock_name] / whole["dualpipe"]
        yield row("dualpipe", whole["dualpipe"], stock_name, whole[stock_name], f"{DUALPIPE_GOAL} or more",
                  ratio >= DUALPIPE_GOAL)
    for name, simulated in found["simulated"].items():
        value = found["alone"][name]
        message, ping = (f"{1000 * found[key][name]:.2f} ms" for key in ("message", "ping"))
        yield row(f"{name}, pipeline alone,", value, f"simulated, message {message} (a ping {ping})",
                  simulated, "within 5 %", abs(value / simulated - 1) <= 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="times that each engine is started")
    parser.add_argument("--steps", type=int, default=5, help="that count, each time")
    parser.add_argument("--contest", choices=CONTESTS, help="one of them only")
    parser.add_argument("--picture", type=Path, help="draw the best recorded step of the last contest here")
    args = parser.parse_args()
    table = []
    for contest in [args.contest] if args.contest else CONTESTS:
        found = hold(contest, args.rounds, args.steps)
        for name, value in found["whole"].items():
            print(f"{contest}: {name}: {1000 * value:.0f} ms")
        table += rows(contest, found)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        print(f"{row['name']} {row['value']:.0f} ms; {row['peer']} {row['peer_value']:.0f} ms; "
              f"{row['ratio']:.3f} ({row['goal']})" + {True: "", False: "  MISSED", None: ""}[row["holds"]])
    if args.picture:
        from megatron_ext.pipeline import Timeline, draw

        best = min(found["timeline"], key=lambda name: found["whole"][name])
        draw(Timeline.from_json(found["timeline"][best]), args.picture, title=f"{best}, as it ran")


if __name__ == "__main__":
    main()
