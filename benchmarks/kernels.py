"""The kernels against their peers: the goals of the FP8 work, in one command on one device, side by side in one run.

    python benchmarks/kernels.py --json runs/benchmarks/kernels.json [--picture runs/benchmarks/kernels.png]

On a Hopper GPU (no figure has been taken on one yet):

    1   dense product, M=4096, six (N, K) of V3            1.45x torch BF16, 1x F.scaled_mm, 0.97x DeepGEMM; 1150 TFLOPS
    2   weight gradient added to FP32 main_grad            1.15x (F.scaled_mm + add_), 950 TFLOPS
    3   grouped forward and dgrad, E=8 and skewed E=32     1150 TFLOPS, 1.4x BF16 grouped_mm, 2x a BF16 loop, no sync
    4   grouped weight gradient                            800 TFLOPS; N=768 and empty groups right
    5   quantise                                           88 % of a copy's bandwidth; both ways 1.4x two passes
    6   SwiGLU, RMSNorm, permute, each with quantise       1.7x, 1.8x, 2x unfused
    7   dispatch payload                                   0.516x the bytes of BF16
    8   linear forward and backward, 7168x18432            1.35x BF16, 1.15x torchao; saved activations 0.52x
    9   accuracy                                           3e-4 randn, 8e-4 rand; 20 runs alike; all backends' bytes
    10  first GEMM after import                            0.3 s; every K % 128 == 0 and M = 1..7 right

Peers are timed where they are installed: `pip install sgl-deep-gemm==0.2.5` (DeepGEMM), `pip install torchao==0.18.0`.
On a CPU: quantise 20x eager torch and 0.8x copy_, FP8-emulated linear within 1.25x of FP32 and 3x BF16 (where there are
no BF16 matrix units), AdamW 1x torch's fused one with half its state, and rows 7, 8 (bytes) and 9.

Contestants take turns, round by round; a figure is the median. On a GPU they are CUDA graphs (by events where one
cannot be captured, which the row says), on random data, with the L2 cache flushed in between. A ratio is how many times
faster ours is. Every group of rows has a process of its own; what fails, says so in its row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from kernel_rows import Item, Point, Row, cpu, layer, memory, products, roofline
from kernel_rows.isolation import run_group

Group = Callable[..., Iterator[Item]]

LIMIT = 600.0
"""Seconds that a group may be silent: DeepGEMM compiles for one to two minutes, DeepSpeed's Adam for as long."""


def groups(device: torch.device, rounds: int, backend: str) -> dict[str, tuple[Group, tuple]]:
    """The groups of a device by name, each with its arguments."""
    timed, anywhere = (rounds, backend), (device, backend)
    if device.type == "cpu":
        return {"quantise": (cpu.quantise, (rounds,)), "linear": (cpu.linear, (rounds,)),
                "adamw": (cpu.adamw, (rounds,)), "deepspeed": (cpu.adamw_deepspeed, (rounds,)),
                "payload": (memory.payload, ()), "saved": (layer.saved, anywhere),
                "accuracy": (layer.accuracy, anywhere)}
    return {"dense": (products.dense, timed), "wgrad": (products.wgrad, timed), "grouped": (products.grouped, timed),
            "grouped_wgrad": (products.grouped_wgrad, timed), "quantise": (memory.quantise, timed),
            "fused": (memory.fused, timed), "payload": (memory.payload, ()), "linear": (layer.linear, timed),
            "accuracy": (layer.accuracy, anywhere), "first": (layer.first, timed), "adamw": (memory.adamw, timed)}


def told(row: Row) -> str:
    """A row as it is printed."""
    value = "-" if row.value is None else f"{row.value:.4g}"
    peer = row.peer if row.peer_value is None else f"{row.peer} {row.peer_value:.4g}"
    ratio = "" if row.ratio is None else f", {row.ratio:.3f}x"
    verdict = {True: "pass", False: "FALLS SHORT", None: "not judged"}[row.holds]
    return f"{verdict:12s}{row.name}: {value} {row.unit}; {peer}{ratio}" + f" ({row.goal})" * (row.goal != "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/kernels.json"))
    parser.add_argument("--picture", type=Path, help="draw the roofline here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    names = ("; ".join(f"{kind}: {', '.join(groups(torch.device(kind), 1, ''))}" for kind in ("cpu", "cuda")))
    parser.add_argument("--only", nargs="+", metavar="GROUP", help=f"of these; {names}")
    parser.add_argument("--rounds", type=int, default=15, help="of which the median is taken")
    parser.add_argument("--backend", default="auto", help="of our kernels")
    args = parser.parse_args()
    device = torch.device(args.device)
    available = groups(device, args.rounds, args.backend)
    unknown = [name for name in args.only or () if name not in available]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: there are {', '.join(available)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be 1 or more")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    print(f"{name}, torch {torch.__version__}, {args.rounds} rounds")
    rows: list[Row] = []
    points: list[Point] = []
    for group in args.only or available:
        function, arguments = available[group]
        for item in run_group(group, function, *arguments, limit=LIMIT):
            if isinstance(item, Point):
                points.append(item)
            else:
                rows.append(item)
                print(told(item), flush=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    judged = [row.holds for row in rows if row.holds is not None]
    print(f"{sum(judged)} of {len(judged)} judged rows hold; {args.json}")
    if args.picture and points:
        roofline.draw(points, name, args.picture)
        print(args.picture)


if __name__ == "__main__":
    main()
