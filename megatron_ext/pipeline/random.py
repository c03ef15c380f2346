"""Random numbers keyed by what is computed, never by who happens to compute it.

Before the forward of every layer, and of every phase of a layer that has phases, the generators of the host and of the
device are seeded from (seed, step, micro-batch of the global batch, layer, phase). The same dropout then falls in every
layout of ranks, under recomputation, and after a resume, and one process can reproduce any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A well spread 63-bit number that depends on every argument and their order (splitmix64 as the round function)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class RandomKey:
    """Names the random numbers of one micro-batch of one step; `layer` picks those of one layer.

    Attributes:
        seed: of the run (`PipelineModule(base_seed=...)`).
        step: optimizer steps taken so far.
        micro_batch: number of the micro-batch within the global batch of the step.
    """

    seed: int
    step: int
    micro_batch: int

    def seed_layer(self, layer: int, phase: int = 0) -> None:
        """Seeds torch's default generators, of the host and of the current device, for a phase of a layer.

        Not by `torch.manual_seed`: where no CUDA device has been started it keeps the call, with a stack trace, for the
        day one is; that cost 5 ms a layer and grew without end.
        """
        number, device = mix(self.seed, self.step, self.micro_batch, layer, phase), current_device()
        torch.default_generator.manual_seed(number)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(number)


@contextmanager
def preserved_generators(device: torch.device) -> Iterator[None]:
    """Leaves the user's own random streams as they were."""
    if device.type == "cpu":  # around every computation, so without the loops of fork_rng
        state = torch.default_generator.get_state()
        try:
            yield
        finally:
            torch.default_generator.set_state(state)
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield


def current_device() -> torch.device:
    """The accelerator that this process uses, if it has started one; else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or (accelerator.type == "cuda" and not torch.cuda.is_initialized()):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
