"""Does `"schedule": "auto"` pick the best one? In regimes that differ, its pick is run against every other candidate.

Four ranks over gloo whose computations are sleeps (emulation/). For each placement and regime an engine under "auto"
measures and chooses; then an engine is made for each schedule that this placement allows, with the times that were
measured, and all take turns. Figures are medians of the pipeline's seconds per step.

    python benchmarks/auto_schedule.py --json runs/benchmarks/auto_schedule.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from emulation import WIDTH, Clock, Layer, Seconds, run_ranks, time_pipeline

RANKS, MICRO_BATCHES = 4, 8
BEST = 1.02  # a pick this close to the fastest that ran is confirmed


@dataclass(frozen=True)
class Regime:
    """What the emulated model takes, and how many activations a rank may hold."""

    name: str
    seconds: Seconds
    memory_limit: float | None = None


NO_GAIN = Regime("no overlap gain", Seconds(0.020, 0.020, 0.020))
EP_BOUND = Regime("EP-bound", Seconds(0.020, 0.020, 0.010, pair=0.032))
TIGHT = Regime("tight memory", Seconds(0.020, 0.020, 0.020, pair=0.048), 3)
CASES = [(NO_GAIN, "ring", 1), (EP_BOUND, "ring", 1), (TIGHT, "ring", 1), (NO_GAIN, "ring", 2), (EP_BOUND, "ring", 2),
         (NO_GAIN, "wave", 2), (EP_BOUND, "wave", 2), (TIGHT, "wave", 2),
         (NO_GAIN, "bidirectional", 1), (EP_BOUND, "bidirectional", 1), (TIGHT, "bidirectional", 1)]


def build(regime: Regime, placement: str, chunks: int, clock: Clock) -> Any:
    from deepspeed.pipe import LayerSpec

    import megatron_ext
    from megatron_ext.pipeline.choice import PLACEMENTS

    place = PLACEMENTS[placement](RANKS, chunks)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_BATCHES // len(place),
              "steps_per_print": 10**6, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
              "megatron_ext": {"pipeline": {"schedule": "auto", "stages": RANKS, "placement": placement,
                                            "chunks": chunks, "memory_limit": regime.memory_limit}}}
    layers = [LayerSpec(Layer, regime.seconds.over(chunks), clock) for _ in range(len(place[0]))]
    model = megatron_ext.PipelineModule(layers=layers, loss_fn=nn.functional.mse_loss, partition_method="uniform",
                                        config=config)
    return megatron_ext.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def measure(rank: int, case: int, rounds: int) -> dict[str, Any]:
    """One rank: what was chosen, and the seconds of every candidate."""
    from megatron_ext.engine.schedule_choice import MEASURED
    from megatron_ext.pipeline.schedules import schedule

    regime, placement, chunks = CASES[case]
    engine = build(regime, placement, chunks, Clock())
    data = itertools.repeat((torch.full((1, WIDTH), float(rank)), torch.ones(1, WIDTH)))
    for _ in range(MEASURED + 1):
        engine.train_batch(data)
    choice = engine._choice
    names = [c.name for c in choice.candidates if c.built and c.makespan is not None]
    plans = {name: schedule(name, RANKS, MICRO_BATCHES, choice.times, chunks, regime.memory_limit) for name in names}
    assert engine.plan() == plans[choice.name]
    alone = time_pipeline(engine)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, plan in plans.items():
            engine.plan = lambda plan=plan: plan
            dist.barrier()
            engine.train_batch(data)
            step = torch.tensor(alone[0])
            dist.all_reduce(step, op=dist.ReduceOp.MAX)
            if turn:
                seconds[name].append(step.item())
    return {"choice": choice.name, "why": choice.why, "seconds": {n: statistics.median(v) for n, v in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table = []
    for number, (regime, placement, chunks) in enumerate(CASES):
        found = run_ranks(measure, RANKS, number, args.rounds)
        seconds, picked = found["seconds"], found["choice"]
        fastest = min(seconds, key=lambda name: seconds[name])
        ratio = seconds[picked] / seconds[fastest]
        limit = f", {regime.memory_limit} activations" if regime.memory_limit else ""
        table.append({"name": f"auto picks {picked}: {regime.name}{limit}, {placement} with {chunks} chunk(s)",
                      "value": 1000 * seconds[picked], "unit": "ms",
                      "peer": f"fastest that ran ({fastest}) of " + ", ".join(
                          f"{n} {1000 * s:.0f}" for n, s in seconds.items()),
                      "peer_value": 1000 * seconds[fastest], "ratio": ratio, "goal": f"{BEST} or less",
                      "holds": ratio <= BEST})
        print(f"{table[-1]['name']}: {ratio:.3f} of {table[-1]['peer']}" + ("" if ratio <= BEST else "  MISSED"))
        print(f"    {found['why']}")
    for placement, chunks in dict.fromkeys((placement, chunks) for _, placement, chunks in CASES):
        picks = {regime.name: row["name"].split()[2].rstrip(":")
                 for row, (regime, *place) in zip(table, CASES, strict=True) if place == [placement, chunks]}
        print(f"{placement} with {chunks} chunk(s): " + ", ".join(f"{r} {p}" for r, p in picks.items()))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
