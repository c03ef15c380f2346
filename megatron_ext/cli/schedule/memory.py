"""Bytes that a rank holds under a plan: its weights with their gradients, and the activations at their peak."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_ext.config.errors import ConfigError
from megatron_ext.models.config import DeepSeekV3Config
from megatron_ext.models.memory import LayerMemory, layer_memory
from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.partition import partition
from megatron_ext.pipeline.timeline import Timeline

BYTES, GRADIENT_BYTES = 2, 4
"""Of a number in BF16, and of the FP32 gradient that every parameter has (`main_grad`)."""


@dataclass(frozen=True)
class Job:
    """A model as it is trained, in BF16.

    Attributes:
        layers: of `deepseek_v3(config)`.
        expert_parallel: ranks that share the experts of a layer.
        message: bytes of the activation that one stage passes to the next.
    """

    layers: list[LayerMemory]
    expert_parallel: int
    message: int

    @classmethod
    def read(cls, path: Path, micro_batch_size: int, sequence_length: int, expert_parallel: int, fp8: bool) -> Job:
        """From a Hugging Face `config.json`, or its folder.

        Raises:
            ConfigError: for a config that cannot be read, or sizes that do not fit it.
        """
        config = DeepSeekV3Config.from_hf(path)
        layers = layer_memory(config, micro_batch_size, sequence_length, dtype_bytes=BYTES, fp8=fp8)
        if expert_parallel < 1 or config.n_routed_experts % expert_parallel:
            raise ConfigError("expert_parallel", expert_parallel,
                              f"must divide the {config.n_routed_experts} routed experts of the model")
        return cls(layers, expert_parallel, BYTES * micro_batch_size * sequence_length * config.hidden_size)

    def peak_bytes(self, plan: Plan, timeline: Timeline) -> list[int]:
        """For each rank: weights and gradients, and activations when it holds most. Optimizer states, which ZeRO shards
        and offload moves to the host, and what a computation needs while it runs are apart.

        Raises:
            ConfigError: the plan has more stages than the model has layers.
        """
        names, parameters = [""] * len(self.layers), [layer.parameters for layer in self.layers]
        bounds = list(pairwise(partition("parameters", names, parameters, plan.stages * plan.chunks)))
        weights = [(BYTES + GRADIENT_BYTES) * sum(layer.parameters_of_rank(self.expert_parallel)
                                                  for layer in self.layers[a:b]) for a, b in bounds]
        activations = [sum(layer.activation for layer in self.layers[a:b]) + (self.message if a else 0)
                       for a, b in bounds]
        peaks = []
        for rank in range(plan.stages):
            held = {stage for place in plan.placement for stage, holder in enumerate(place) if holder == rank}
            peaks.append(sum(weights[stage] for stage in held) + int(timeline.peak_activations(rank, activations)))
        return peaks
