"""DeepSpeed's ZeRO-1/2 optimizer on pipeline stages that differ: one with experts, one without.

ZeRO computes a norm per parameter group and sums each over the model-parallel group. Experts make a group of their own, so a
pair of stages without experts has fewer groups than one with, takes part in fewer sums, and the step hangs. Here every
rank takes part in as many sums as the rank with the most groups.
"""

from __future__ import annotations

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


class PipelineZeroOptimizer(DeepSpeedZeroOptimizer):
    """Takes over an optimizer that DeepSpeed has made, by class assignment; adds no state but `most_groups`."""

    most_groups: int = 0
    """Parameter groups on the rank of the job that has the most."""

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """L2 norm over all groups of all stages; -1 if it is not finite, as in DeepSpeed."""
        norms = [super().scaled_global_norm(norm_type)]
        for _ in range(self.most_groups - len(self.bit16_groups)):
            # No parameters of ours: what comes back are the other stages' groups.
            norms.append(self.complete_grad_norm_calculation_for_cpu_offload([]) if self.cpu_offload
                         else self.get_grad_norm_direct([], []))
        stacked = torch.stack([n.to(norms[0].device).reshape(()) for n in norms])
        return torch.where((stacked < 0).any(), torch.full_like(stacked[0], -1.0), stacked.pow(2).sum().sqrt())
