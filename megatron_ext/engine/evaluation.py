"""`eval_batch`: forwards only, over all directions of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config import ConfigError
from megatron_ext.pipeline.evaluation import forward_only


class EvaluationMixin:
    """The part of the engine that evaluates."""

    @torch.no_grad()
    def eval_batch(self, data_iter: Iterator[Any], return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True,
                   num_micro_batches: int | None = None) -> Any:
        """Forward only, over all directions.

        Args:
            data_iter: on ranks where a direction starts: batches of this rank's shard.
            return_logits: also return the outputs of the last stage, a list where a direction ends, None elsewhere.
            compute_loss: False returns only those outputs.
            reduce_output: "avg" for the mean loss; None for every micro-batch's, in the order of the global batch.
            bcast_loss: the loss is the same on every rank in any case.
            num_micro_batches: per direction; n if None.
        """
        if reduce_output not in ("avg", None):
            raise ConfigError("reduce_output", reduce_output, 'must be "avg" or None')
        count = num_micro_batches or self.gradient_accumulation_steps()
        key = ("evaluation", self._total(count))
        if key not in self._plans:
            self._plans[key] = forward_only(self.module.placement, self.module.num_stages, key[1])
        was_training = self.module.training
        self.module.eval()
        try:
            batches = self._by_direction(data_iter, "eval_batch")
            outcome = self.executor.run(self._plans[key], batches, self.global_steps, training=False,
                                        keep_outputs=return_logits or not compute_loss, compute_loss=compute_loss)
        finally:
            self.module.train(was_training)
            self.traffic.take()  # a training step's counts are its own
        outputs = [value for _, value in sorted(outcome.outputs.items())] if self.is_last_stage() else None
        if not compute_loss:
            return outputs
        loss = self._mean_loss(outcome.losses) if reduce_output == "avg" else self._all_losses(outcome.losses, count)
        return (loss, outputs) if return_logits else loss

    def _all_losses(self, losses: list[Tensor], count: int) -> Tensor:
        """[n * shards] losses in the order of the global batch; a rank has those of one direction, by micro-batch."""
        grid = self.process_groups.topology
        every = torch.zeros(count, grid.data_parallel_size, device=self.device)
        if losses:
            [direction] = [d for d, p in enumerate(self.module.placement) if p[-1] == self.module.stage_rank]
            every[:, grid.shard(direction, grid.replica(self.process_groups.rank))] = torch.stack(losses)
        dist.all_reduce(every)
        return every.flatten()
