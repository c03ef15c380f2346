"""Does FP8 learn what BF16 learns? Three trainings of the main job's model that differ in one thing each.

    bf16        every matrix product in BF16 operands
    fp8         linears and experts in FP8 (forward, both gradients), tokens dispatched in FP8, combined in BF16
    perturbed   bf16 again, but each initial weight rounded to the other of its two BF16 neighbours

Model, data, order of samples, optimizer, learning rate, clipping and bias speed are those of
examples/pretrain_deepseek_v3.{py,json}. Everything runs in one process with all experts: BF16 weights, FP32 gradients
and master weights, BF16 moments; experts' messages are rounded as if they were sent. The claim of the DeepSeek-V3
report (section 3.3) is a relative loss error below 0.25 %; here it is the signed difference of the mean losses of the
second half. The third run says how far two runs come apart by rounding alone, for a trajectory is chaotic: a router
that decides one token otherwise is enough.

    python benchmarks/fp8_convergence.py --json runs/benchmarks/fp8_convergence.json [--jobs 2] [--seeds 1234 1235]

writes the rows, and beside them a picture and the losses (.png, .csv).
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
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
VARIANTS = ("bf16", "fp8", "perturbed")
LENGTH, MICRO_BATCH = 128, 8
GOAL = 0.0025


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
    model.set_precision(Precision(fp8=True, dispatch_dtype=experts["dispatch_dtype"],
                                  combine_dtype=experts["combine_dtype"], weights=cache)
                        if variant == "fp8" else Precision())
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


def rows(curves: dict[tuple[int, str], list[float]], seeds: list[int]) -> list[dict[str, Any]]:
    """A row per seed and run against bf16, and for several seeds one for the mean difference."""
    found = []
    steps = len(next(iter(curves.values())))
    span = f"mean loss of steps {steps // 2 + 1} to {steps}"
    for seed in seeds:
        for variant in VARIANTS[1:]:
            value, peer = late(curves[seed, variant]), late(curves[seed, "bf16"])
            found.append(_row(f"{variant}: {span}, seed {seed}", value, peer, variant == "fp8"))
    if len(seeds) > 1:
        for variant in VARIANTS[1:]:
            value, peer = (sum(late(curves[s, v]) for s in seeds) / len(seeds) for v in (variant, "bf16"))
            found.append(_row(f"{variant}: {span}, mean of {len(seeds)} seeds", value, peer, variant == "fp8"))
    return found


def _row(name: str, value: float, peer: float, judged: bool) -> dict[str, Any]:
    ratio = value / peer
    return {"name": name, "value": value, "unit": "nats per byte", "peer": "bf16", "peer_value": peer, "ratio": ratio,
            "goal": f"within {GOAL:.2%} of 1" if judged else "none: the size of the noise",
            "holds": abs(ratio - 1) < GOAL if judged else None}


def draw(curves: dict[tuple[int, str], list[float]], seed: int, path: Path) -> None:
    """Losses, and beneath them the relative distance of both other runs to bf16."""
    from matplotlib.figure import Figure

    colours = {"bf16": "#222222", "fp8": "#d9682b", "perturbed": "#6fa5dc"}
    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    base = torch.tensor(curves[seed, "bf16"])
    steps = range(1, len(base) + 1)
    for variant in VARIANTS:
        above.plot(steps, curves[seed, variant], color=colours[variant], linewidth=1.1, label=variant)
        if variant == "bf16":
            continue
        ratio = 100 * (torch.tensor(curves[seed, variant]) / base - 1)
        late_ratio = 100 * (late(curves[seed, variant]) / late(curves[seed, "bf16"]) - 1)
        below.plot(steps, ratio, color=colours[variant], linewidth=1,
                   label=f"{variant}, second half {late_ratio:+.3f} %")
    below.axhspan(-100 * GOAL, 100 * GOAL, xmin=0, color="#3c8f4f", alpha=0.15, label=f"±{GOAL:.2%}")
    below.axhline(0, color="#777777", linewidth=0.8)
    above.set(ylabel="loss [nats per byte]", title=f"The main job's model in BF16 and in FP8, seed {seed}")
    below.set(xlabel="step", ylabel="loss against bf16 [%]")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9, ncols=3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234], help="the picture is of the first")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one core each")
    args = parser.parse_args()
    start = time.perf_counter()
    runs = [(seed, variant) for seed in args.seeds for variant in VARIANTS]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {(seed, variant): pool.submit(train, variant, seed, args.steps) for seed, variant in runs}
        curves = {run: future.result() for run, future in futures.items()}
    found = rows(curves, args.seeds)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    with open(args.json.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{variant} seed {seed}" for seed, variant in runs)])
        columns = [[f"{loss:.6f}" for loss in curves[run]] for run in runs]
        writer.writerows(zip(range(1, args.steps + 1), *columns, strict=True))
    draw(curves, args.seeds[0], args.json.with_suffix(".png"))
    for row in found:
        print(f"{row['name']}: {row['value']:.5f}, {row['peer']} {row['peer_value']:.5f}, {row['ratio'] - 1:+.3%}"
              + ("" if row["holds"] is None else f"  ({'holds' if row['holds'] else 'MISSED'})"))
    print(f"{time.perf_counter() - start:.0f} s; {args.json}, {args.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
