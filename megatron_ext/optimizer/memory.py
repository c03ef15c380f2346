"""What an optimizer holds, counted from its tensors: 4 bytes a parameter of master weights, 4 of BF16 moments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerStateBytes:
    """Bytes that one rank's optimizer holds, by device ("cpu", "cuda:0").

    Attributes:
        parameters: numbers that this rank updates; under ZeRO its partitions, with the padding that aligns them.
        master: of the parameters that the optimizer steps: ZeRO's FP32 partitions, or else the model's own parameters.
        moments: of the state tensors shaped like them.
    """

    parameters: int
    master: Mapping[str, int]
    moments: Mapping[str, int]

    @property
    def per_parameter(self) -> tuple[float, float]:
        """(master, moments) bytes a parameter, over all devices."""
        count = max(self.parameters, 1)
        return sum(self.master.values()) / count, sum(self.moments.values()) / count


def optimizer_state_bytes(optimizer: Any) -> OptimizerStateBytes:
    """Counts the tensors of a torch optimizer, or of the one inside DeepSpeed's wrappers (`engine.optimizer`)."""
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    master: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    for p in parameters:
        master[str(p.device)] += p.nbytes
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                moments[str(value.device)] += value.nbytes
    return OptimizerStateBytes(sum(p.numel() for p in parameters), dict(master), dict(moments))
