"""Does FP8 learn what BF16 learns? Four trainings of the main job's model that differ in one thing each.

    bf16        every matrix product in BF16 operands
    fp8         linears and experts in FP8 (forward, both gradients), tokens dispatched in FP8, combined in BF16
    uncached    the same without the activation cache: activations kept as BF16 keeps them, SwiGLU not recomputed
    perturbed   bf16 again, but each initial weight rounded to the other of its two BF16 neighbours

Model, data, order of samples, optimizer, learning rate, clipping and bias speed are those of
examples/pretrain_deepseek_v3.{py,json}. Everything runs in one process with all experts: BF16 weights, FP32 gradients
and master weights, BF16 moments; experts' messages are rounded as if they were sent. The claim of the DeepSeek-V3
report (section 3.3) is a relative loss error below 0.25 %; here it is the signed difference of the mean losses of the
second half. What the activation cache changes is judged by fp8 against uncached. The last run says how far two runs
come apart by rounding alone, for a trajectory is chaotic: a router that decides one token otherwise is enough.

    python benchmarks/fp8_convergence.py --json runs/benchmarks/fp8_convergence.json [--jobs 2] [--seeds 1234 1235]

writes the rows, and beside them a picture and the losses (.png, .csv). One seed takes 7 to 12 minutes of one core;
`--add` goes on from the losses that are there.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.data import (
    ByteTokenizer,
    GPTDataset,
    MicroBatchLoader,
    standard_library_files,
    text_stream,
)
from megatron_ext.fp8 import Precision, WeightCache
from megatron_ext.layers.balancing import update_biases
from megatron_ext.layers.router import Router
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config, cross_entropy
from megatron_ext.optimizer import AdamW
from megatron_ext.pipeline.weight_gradients import WeightGradients

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
VARIANTS = ("bf16", "fp8", "uncached", "perturbed")
LENGTH, MICRO_BATCH = 128, 8
GOAL = 0.0025

Curves = dict[tuple[int, str], list[float]]
"""Losses by (seed, variant)."""


def other_neighbour(weight: Tensor) -> Tensor:
    """FP32 -> BF16, each number rounded to the one of its two BF16 neighbours that is not the nearest."""
    nearest = weight.bfloat16()
    away = torch.where(weight < nearest.float(), -math.inf, math.inf).bfloat16()
    return torch.nextafter(nearest, away)


def build(variant: str, seed: int, config: dict[str, Any], cache: WeightCache) -> DeepSeekV3:
    """The model in BF16, drawn as the pipeline draws it."""
    torch.manual_seed(seed)
    model = DeepSeekV3(DeepSeekV3Config.from_hf(EXAMPLES / "deepseek_v3_tiny.json"))
    with torch.no_grad():
        for p in model.parameters():
            p.data = other_neighbour(p) if variant == "perturbed" else p.bfloat16()
    experts = config["megatron_ext"]["expert_parallel"]
    model.set_precision(Precision(fp8=True, activation_cache=variant == "fp8", weights=cache,
                                  dispatch_dtype=experts["dispatch_dtype"], combine_dtype=experts["combine_dtype"])
                        if variant in ("fp8", "uncached") else Precision())
    return model.train()


def train(variant: str, seed: int, steps: int) -> list[float]:
    """The loss of every step."""
    from deepspeed.runtime.lr_schedules import WarmupCosineLR

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    config = json.loads((EXAMPLES / "pretrain_deepseek_v3.json").read_text())
    cache = WeightCache()
    model = build(variant, seed, config, cache)
    gates = [module for module in model.modules() if isinstance(module, Router)]
    gradients = WeightGradients(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in gradients.parameters]
    optimizer = AdamW(masters, **config["optimizer"]["params"],
                      moment_dtype=config["megatron_ext"]["optimizer"]["moment_dtype"])
    schedule = config["scheduler"]["params"] | {"total_num_steps": steps, "warmup_num_steps": max(2, steps // 8)}
    scheduler = WarmupCosineLR(optimizer, **schedule)
    data = GPTDataset(text_stream(standard_library_files("train"), ByteTokenizer()), LENGTH)
    count = config["train_batch_size"] // MICRO_BATCH
    loader = MicroBatchLoader(data, MICRO_BATCH, micro_batches_per_step=count, seed=seed)
    losses = []
    for step in range(steps):
        gradients.begin()
        mean = 0.0
        for _ in range(count):
            tokens, labels = next(loader)
            loss = cross_entropy(model(tokens), labels)
            gradients.backward([loss / count], [None], defer=None)
            mean += loss.item() / count
        for p, master in zip(gradients.parameters, masters, strict=True):
            master.grad = p.main_grad
        nn.utils.clip_grad_norm_(masters, config["gradient_clipping"])
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for p, master in zip(gradients.parameters, masters, strict=True):
                p.copy_(master)
        cache.clear()
        update_biases(gates, config["megatron_ext"]["router"]["bias_update_speed"])
        losses.append(mean)
        if (step + 1) % 20 == 0:
            print(f"seed {seed} {variant:9s} step {step + 1:4d}  loss {mean:.4f}", flush=True)
    return losses


def late(losses: list[float]) -> float:
    """Mean of the second half."""
    half = losses[len(losses) // 2:]
    return sum(half) / len(half)


def read_curves(path: Path, steps: int) -> Curves:
    """What `write_curves` wrote, if it is of as many steps."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    if len(lines) != steps:
        raise SystemExit(f"{path} holds {len(lines)} steps, not {steps}: leave --add out to begin anew")
    columns = list(zip(*lines, strict=True))
    names = [name.split(" seed ") for name in header[1:]]
    return {(int(seed), variant): [float(loss) for loss in column]
            for (variant, seed), column in zip(names, columns[1:], strict=True)}


def write_curves(path: Path, curves: Curves) -> None:
    """A column per training, a row per step."""
    runs = sorted(curves)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{variant} seed {seed}" for seed, variant in runs)])
        columns = [[f"{loss:.6f}" for loss in curves[run]] for run in runs]
        writer.writerows(zip(range(1, len(columns[0]) + 1), *columns, strict=True))


def rows(curves: Curves, seeds: list[int]) -> list[dict[str, Any]]:
    """The mean over the seeds against bf16's, which is judged; for several seeds also each, which tells the noise."""
    steps = len(curves[seeds[0], "bf16"])
    span = f"mean loss of steps {steps // 2 + 1} to {steps}"
    groups = [seeds] + [[seed] for seed in seeds if len(seeds) > 1]
    found = []
    for group in groups:
        where = f"seed {group[0]}" if len(group) == 1 else f"mean of {len(group)} seeds"
        for variant in VARIANTS[1:]:
            value, peer = (sum(late(curves[seed, v]) for seed in group) / len(group) for v in (variant, "bf16"))
            judged = variant == "fp8" and group is seeds
            found.append({
                "name": f"{variant}: {span}, {where}", "value": value, "unit": "nats per byte", "peer": "bf16",
                "peer_value": peer, "ratio": value / peer,
                "goal": f"within {GOAL:.2%} of 1" if judged else "none: it shows the noise",
                "holds": abs(value / peer - 1) < GOAL if judged else None})
        cached, apart = (sum(late(curves[seed, v]) for seed in group) / len(group) for v in ("fp8", "uncached"))
        found.append({
            "name": f"fp8, what the activation cache changes: {span}, {where}", "value": cached,
            "unit": "nats per byte", "peer": "uncached", "peer_value": apart, "ratio": cached / apart,
            "goal": f"within {GOAL:.2%} of 1" if group is seeds else "none: it shows the noise",
            "holds": abs(cached / apart - 1) < GOAL if group is seeds else None})
    return found


def draw(curves: Curves, seeds: list[int], path: Path) -> None:
    """Losses of the first seed, their distance to bf16, and where each seed ends up."""
    from matplotlib.figure import Figure

    colours = {"bf16": "#222222", "fp8": "#d9682b", "uncached": "#8a5fb0", "perturbed": "#6fa5dc"}
    figure = Figure(figsize=(8.5, 7.5 if len(seeds) > 1 else 6.5), layout="constrained")
    above, below, *ends = figure.subplots(2 + (len(seeds) > 1), 1, height_ratios=(3, 2, 1.6)[:2 + (len(seeds) > 1)])
    base = torch.tensor(curves[seeds[0], "bf16"])
    steps = range(1, len(base) + 1)
    for variant in VARIANTS:
        above.plot(steps, curves[seeds[0], variant], color=colours[variant], linewidth=1.1, label=variant)
        if variant != "bf16":
            ratio = 100 * (torch.tensor(curves[seeds[0], variant]) / base - 1)
            below.plot(steps, ratio, color=colours[variant], linewidth=1,
                       label=f"{variant}, second half {100 * distance(curves, seeds[0], variant):+.3f} %")
    below.axhspan(-100 * GOAL, 100 * GOAL, color="#3c8f4f", alpha=0.15, label=f"±{GOAL:.2%}")
    below.axhline(0, color="#777777", linewidth=0.8)
    above.set(ylabel="loss [nats per byte]", title=f"The main job's model in BF16 and in FP8, seed {seeds[0]}")
    below.set(xlabel="step", ylabel="loss against bf16 [%]")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9, ncols=3)
    for axes in ends:
        _draw_seeds(axes, curves, seeds, colours)
    figure.savefig(path, dpi=130)


def _draw_seeds(axes: Any, curves: Curves, seeds: list[int], colours: dict[str, str]) -> None:
    """A dot per seed and run, and a bar for the mean."""
    others = ("perturbed", "uncached", "fp8")
    for row, variant in enumerate(others):
        points = [100 * distance(curves, seed, variant) for seed in seeds]
        mean = sum(points) / len(points)
        axes.plot(points, [row] * len(points), "o", color=colours[variant], alpha=0.7)
        axes.plot([mean, mean], [row - 0.3, row + 0.3], color="#222222", linewidth=2)
        axes.annotate(f"mean {mean:+.3f} %", (mean, row + 0.3), (5, -3), textcoords="offset points", fontsize=9)
    axes.axvspan(-100 * GOAL, 100 * GOAL, color="#3c8f4f", alpha=0.15)
    axes.set(yticks=range(len(others)), yticklabels=others, ylim=(-0.5, len(others) - 0.4),
             xlabel=f"second half against bf16 [%], {len(seeds)} seeds; green: ±{GOAL:.2%}")
    axes.grid(alpha=0.3, axis="x")


def distance(curves: Curves, seed: int, variant: str) -> float:
    """Relative distance of the second half to bf16's."""
    return late(curves[seed, variant]) / late(curves[seed, "bf16"]) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234], help="the curves drawn are of the first")
    parser.add_argument("--add", action="store_true", help="to the trainings that the .csv beside --json holds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one core each")
    args = parser.parse_args()
    start = time.perf_counter()
    store = args.json.with_suffix(".csv")
    store.parent.mkdir(parents=True, exist_ok=True)
    curves = read_curves(store, args.steps) if args.add else {}
    seeds = list(dict.fromkeys([*(seed for seed, _ in curves), *args.seeds]))
    missing = [(seed, variant) for seed in seeds for variant in VARIANTS if (seed, variant) not in curves]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, variant, seed, args.steps): (seed, variant) for seed, variant in missing}
        for future in as_completed(futures):
            curves[futures[future]] = future.result()
            write_curves(store, curves)
    found = rows(curves, seeds)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    draw(curves, seeds, args.json.with_suffix(".png"))
    for row in found:
        print(f"{row['name']}: {row['value']:.5f}, {row['peer']} {row['peer_value']:.5f}, {row['ratio'] - 1:+.3%}"
              + ("" if row["holds"] is None else f"  ({'holds' if row['holds'] else 'MISSED'})"))
    print(f"{time.perf_counter() - start:.0f} s; {args.json}, {args.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
