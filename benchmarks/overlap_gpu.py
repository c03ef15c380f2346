"""The forward-backward pair on one GPU: how much of communication on another stream lies behind computation.

One process. A block of attention, dispatch, MLP and combine at DeepSeek-V3's widths (one expert's) runs the forward of
one micro-batch and the backward of another through the pipeline's own program (pipeline/stage.py, executor.py), whose
exchanges are a stand-in: copies of the same bytes on a stream of their own, as often as it takes to be as long as an
MLP phase. Pairs whose halves take turns and pairs one after the other are interleaved; device time between events.

    hidden = 1 - (pair - pair without communication) / communication

A profile of one pair is saved for Perfetto (`--trace`). On a CPU, where there are no streams, it runs for its function
only and judges nothing. Not yet run on a GPU.

    python benchmarks/overlap_gpu.py --json runs/benchmarks/overlap_gpu.json --trace runs/benchmarks/pair_trace.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.layers.linear import linear
from megatron_ext.layers.phases import Passage, Phase
from megatron_ext.pipeline.executor import _Half, _take_turns
from megatron_ext.pipeline.random import RandomKey
from megatron_ext.pipeline.stage import StageLayer, StageRun

GOAL_HIDDEN, GOAL_SLOWER = 0.9, 1.25


class Copies:
    """A communication that is copies on another stream: x goes out and the same x comes in."""

    keeps, parallel = False, True

    def __init__(self, name: str, read: str, written: str, stream: Any, times: int):
        self.name, self.reads, self.writes, self.stream, self.times = name, ((read,),), ((written,),), stream, times

    def keep(self, passage: Passage, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def advance(self, passage: Passage) -> None:
        pass

    def _start(self, passage: Passage, way: str, x: Tensor) -> None:
        target, event = torch.empty_like(x), None
        if self.stream is None:
            target.copy_(x)
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(self.times):
                    target.copy_(x)
                event = self.stream.record_event()
            x.record_stream(self.stream)
        passage[self.name, way] = target, event

    def _finish(self, passage: Passage, way: str) -> list[Tensor]:
        target, event = passage.pop((self.name, way))
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        return [target]

    def start(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> None:
        self._start(passage, "forward", tensors[0][0])

    def finish(self, passage: Passage, group: int) -> list[Tensor]:
        return self._finish(passage, "forward")

    def start_backward(self, passage: Passage, gradients: Sequence[Sequence[Tensor]]) -> None:
        self._start(passage, "backward", gradients[0][0].contiguous())

    def finish_backward(self, passage: Passage, group: int, kept: Sequence[Any]) -> list[Tensor]:
        return self._finish(passage, "backward")

    def graph(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        return [[tensors[0][0].clone()]]


class Block(nn.Module):
    """Two matrix products for attention, three for the MLP, so that both take about as long."""

    def __init__(self, hidden: int, inner: int, stream: Any, times: int):
        super().__init__()
        shapes = {"first": (inner, hidden), "second": (hidden, inner), "gate": (inner, hidden), "down": (hidden, inner)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / shape[1] ** 0.5))
        self.stream, self.times = stream, times

    def phases(self) -> list[Any]:
        return [Phase("attention", ("x",), ("tokens",), lambda _, x: linear(linear(x, self.first).relu(), self.second)),
                Copies("dispatch", "tokens", "rows", self.stream, self.times),
                Phase("mlp", ("rows",), ("results",), lambda _, x: linear(linear(x, self.gate).relu(), self.down)),
                Copies("combine", "results", "mixed", self.stream, self.times),
                Phase("sum", ("mixed", "tokens"), ("x",), lambda _, mixed, tokens: mixed + tokens)]


@dataclass
class Pair:
    """One micro-batch's forward and another's backward through the same blocks."""

    blocks: list[Block]
    x: Tensor

    def _run(self) -> StageRun:
        layers = [StageLayer(block.phases(), number) for number, block in enumerate(self.blocks)]
        return StageRun(layers, RandomKey(0, 0, 0), training=True)

    def _half(self, run: StageRun, steps: Callable[[], Generator[None, None, Any]]) -> _Half:
        half = _Half(self.x.device)

        def through() -> Generator[None, None, None]:
            half.run = run
            yield from steps()

        half.steps = through()
        return half

    def prepare(self) -> tuple[_Half, _Half]:
        """The backward of a micro-batch that has gone forward, and the forward of the next."""
        before, after = self._run(), self._run()
        first = self._half(before, lambda: before.forward(self.x.detach().requires_grad_()))
        first.finish()
        dy = torch.ones_like(self.x)
        return (self._half(before, lambda: before.backward([dy], torch.autograd.backward)),
                self._half(after, lambda: after.forward(self.x.detach().requires_grad_())))

    def seconds(self, overlap: bool) -> float:
        halves = self.prepare()
        with Clock(self.x.device) as clock:
            if overlap:
                _take_turns(*halves)
            else:
                for half in halves:
                    half.finish()
        for block in self.blocks:
            block.zero_grad(set_to_none=True)
        return clock.seconds


class Clock:
    """Seconds of the device between two events, or of a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __enter__(self) -> Clock:
        if self.cuda:
            torch.cuda.synchronize()
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        if self.cuda:
            self.events[1].record()
            torch.cuda.synchronize()
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1000


def copies_for(seconds: float, x: Tensor, stream: Any) -> int:
    """How many copies of x take so long on the stream, alone."""
    if stream is None:
        return 1
    target = torch.empty_like(x)
    times = []
    for _ in range(5):
        with Clock(x.device) as clock, torch.cuda.stream(stream):
            for _ in range(16):
                target.copy_(x)
        stream.synchronize()
        times.append(clock.seconds)
    return max(1, round(16 * seconds / max(statistics.median(times), 1e-6)))


def measure(device: torch.device, tokens: int, hidden: int, inner: int, blocks: int, rounds: int,
            trace: Path | None) -> list[dict[str, Any]]:
    """Rows of the contest."""
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        stack = [Block(hidden, inner, stream, 0).to(dtype) for _ in range(blocks)]
        x = torch.randn(tokens, hidden, dtype=dtype)
    pair = Pair(stack, x)
    for overlap in (True, False) * 2:  # what is compiled or allocated once, is now
        pair.seconds(overlap)
    alone = statistics.median(pair.seconds(False) for _ in range(rounds))
    phases = 2 * blocks * 3  # attention and MLP, forward once and backward, which is twice as long
    times = copies_for(alone / phases, x, stream)
    for block in stack:
        block.times = times
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for overlap, seconds in found.items():
            seconds.append(pair.seconds(overlap))
    together, apart = (statistics.median(found[overlap]) for overlap in (True, False))
    communication = apart - alone  # one after the other nothing hides
    hidden_share = 1 - (together - alone) / communication if communication > 0 else 0.0
    if trace is not None:
        save_trace(pair, trace)
    judged = device.type == "cuda"
    name = f"pair of {blocks} blocks, {tokens} tokens of {hidden}, {times} copies an exchange"
    return [
        {"name": f"{name}, taking turns", "value": 1000 * together, "unit": "ms", "peer": "one after the other",
         "peer_value": 1000 * apart, "ratio": apart / together, "goal": f"{GOAL_SLOWER} or more",
         "holds": apart / together >= GOAL_SLOWER if judged else None},
        {"name": f"{name}, communication that is hidden", "value": hidden_share, "unit": "share",
         "peer": "milliseconds of communication", "peer_value": 1000 * communication, "ratio": None,
         "goal": f"{GOAL_HIDDEN} or more", "holds": hidden_share >= GOAL_HIDDEN if judged else None}]


def save_trace(pair: Pair, path: Path) -> None:
    """A profile of one pair that takes turns, in Chrome's format."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    halves = pair.prepare()
    with profile(activities=activities) as profiler:
        _take_turns(*halves)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=4096 if cuda else 64)
    parser.add_argument("--hidden", type=int, default=7168 if cuda else 128)
    parser.add_argument("--inner", type=int, default=4096 if cuda else 128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if min(args.tokens, args.hidden, args.inner, args.blocks, args.rounds) < 1:
        parser.error("sizes and --rounds must be at least 1")
    device = torch.device("cuda" if cuda else "cpu")
    rows = measure(device, args.tokens, args.hidden, args.inner, args.blocks, args.rounds, args.trace)
    for row in rows:
        if cuda:
            peer = f"{row['peer']} {row['peer_value']:.3f}"
            print(f"{row['name']}: {row['value']:.3f} {row['unit']}; {peer} ({row['goal']})")
        else:
            print(f"{row['name']}: ran; a CPU has no streams, so there is nothing to say of time")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
