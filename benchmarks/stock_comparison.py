"""One training step under three pipeline engines: stock DeepSpeed's 1F1B and DualPipeV, and DualPipe here.

Four ranks over gloo on this machine, eight equal layers whose forward, input gradient and weight gradient each take
LAYER seconds by sleeping, so that sharing cores does not matter: what is measured is the schedule and what the engine
adds to it, not arithmetic. All three do the same work with the same number of micro-batches. The engines live in the
same processes and take turns; figures are medians.

    python benchmarks/stock_comparison.py --json runs/benchmarks/stock_comparison.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANKS, LAYERS, LAYER, WIDTH = 4, 8, 0.01, 16
ENGINES = ("stock 1F1B", "stock DualPipeV", "DualPipe")


class _Work(torch.autograd.Function):
    """The identity, with a weight whose gradient may be taken later (layers/linear.py describes the sink)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        time.sleep(LAYER)
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        time.sleep(LAYER)

        def accumulate(main_grad: Tensor) -> None:
            time.sleep(LAYER)
            main_grad.add_(1.0)

        sink = getattr(ctx.weight, "weight_grad_sink", None)
        if sink is not None:
            sink(ctx.weight, accumulate)
            return dy.clone(), None
        grad = torch.zeros_like(ctx.weight)
        accumulate(grad)
        return dy.clone(), grad


class Layer(nn.Module):
    """LAYER seconds of forward, and twice that of backward."""

    splits_weight_grad = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return _Work.apply(x.requires_grad_(torch.is_grad_enabled()), self.weight)


def build(name: str, micro_batches: int) -> Any:
    """An engine over the same eight layers; `micro_batches` of the whole batch, whatever they are counted by."""
    import deepspeed
    from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule

    import megatron_ext

    config = {"train_batch_size": micro_batches, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**6,
              "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    face: Any = deepspeed if name.startswith("stock") else megatron_ext
    module = {"stock 1F1B": PipelineModule, "stock DualPipeV": DualPipeVModule,
              "DualPipe": megatron_ext.PipelineModule}[name]
    model = module(layers=[LayerSpec(Layer) for _ in range(LAYERS)], num_stages=RANKS,
                   loss_fn=nn.functional.mse_loss, partition_method="uniform")
    return face.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same micro-batch for ever; another one on every rank."""
    return itertools.repeat((torch.full((1, WIDTH), float(rank)), torch.ones(1, WIDTH)))


def measure(rank: int, port: int, micro_batches: list[int], rounds: int, results: Any) -> None:
    """One rank: every engine and number of micro-batches in turn; a first round does not count."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port), DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # compile nothing: these engines need no operator of DeepSpeed's
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    engines = {(name, m): build(name, m) for m in micro_batches for name in ENGINES}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in engines}
    for turn in range(rounds + 1):
        for key, engine in engines.items():
            torch.distributed.barrier()
            start = time.perf_counter()
            engine.train_batch(batches(rank))
            torch.distributed.barrier()
            if turn:
                times[key].append(time.perf_counter() - start)
    if rank == 0:
        results.put({key: statistics.median(values) for key, values in times.items()})
    torch.distributed.barrier()


def rows(medians: dict[tuple[str, int], float], micro_batches: list[int]) -> list[dict[str, Any]]:
    """DualPipe against both peers, and against what its simulator foretells."""
    from megatron_ext.pipeline import Times, schedule, simulate

    found = []
    share = LAYER * LAYERS / RANKS
    for m in micro_batches:
        value = medians["DualPipe", m]
        plan = schedule("dualpipe", stages=RANKS, micro_batches=m)
        planned = simulate(plan, Times(forward=share, input_grad=share, weight_grad=share, pair=3 * share, message=0))
        peers = {f"DeepSpeed 0.19.8, {name.removeprefix('stock ')}": (medians[name, m], 1.0) for name in ENGINES[:2]}
        peers["the simulator's makespan"] = (planned.makespan, 1.1)
        for peer, (peer_value, goal) in peers.items():
            ratio = value / peer_value
            found.append({"name": f"DualPipe step, {RANKS} ranks, {m} micro-batches, emulated layers",
                          "value": 1000 * value, "unit": "ms", "peer": peer, "peer_value": 1000 * peer_value,
                          "ratio": ratio, "goal": f"below {goal:g}", "holds": ratio < goal})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16], help="of the whole batch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=measure, args=(rank, port, args.micro_batches, args.rounds, results))
             for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")
    found = rows(results.get(), args.micro_batches)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    for row in found:
        print(f"{row['name']}: {row['value']:.0f} ms; {row['peer']} {row['peer_value']:.0f} ms; {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
