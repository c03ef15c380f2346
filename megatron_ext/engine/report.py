"""What a step leaves to look at: metrics, experts' load, timeline of the pipeline; DeepSpeed's monitors and timers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import log_dist
from torch import Tensor

from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.timeline import Timeline


class ReportMixin:
    """The part of the engine that reports; see the attributes of `PipelineEngine`."""

    def _gather_timeline(self, plan: Plan, spans: list[Any]) -> None:
        """Collects what ran on every rank of the pipeline; clocks agree within a host."""
        self._record = False
        ranks: list[Any] = [None] * self.module.num_stages
        dist.all_gather_object(ranks, spans, group=self.process_groups.pipeline)
        start = min(s[0].start for s in ranks if s)
        shifted = [[s._replace(start=s.start - start, end=s.end - start) for s in spans] for spans in ranks]
        self.timeline = Timeline(f"{plan.name}, step {self.global_steps}", shifted, plan.chunks)

    def gather_expert_counts(self) -> dict[str, Tensor]:
        """Tokens per expert of the last step for every router of the model, by name, on every rank; collective."""
        found: list[Any] = [None] * dist.get_world_size()
        mine = {name: counts.cpu() for name, counts in self.expert_counts.items()}
        dist.all_gather_object(found, mine, group=self.process_groups.control)
        merged: dict[str, Tensor] = {}
        for part in found:
            merged.update(part)
        return dict(sorted(merged.items(), key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")]))

    def _worst_violation(self) -> float:
        """MaxVio of the model's worst layer in the last step, on every rank; -1 without experts. Collective."""
        if not self._balances:
            return -1.0
        worst = torch.full((), -1.0, device=self.device)
        for counts in self.expert_counts.values():
            total = counts.sum().clamp(min=1)
            worst = torch.maximum(worst, counts.max() * counts.numel() / total - 1)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item()

    def _traffic_metrics(self) -> dict[str, float | None]:
        """Bytes and seconds of this rank's expert traffic in the last step, over all kinds; seconds over gloo only, for
        elsewhere it is the device that waits."""
        total = {what: sum(kind[what] for kind in self.expert_traffic.values())
                 for what in ("node", "fabric", "exposed", "under_way")}
        group = self.process_groups.expert_parallel
        timed = group is not None and dist.get_backend(group) == "gloo"
        return {"expert_bytes_node": total["node"], "expert_bytes_fabric": total["fabric"],
                "expert_seconds_exposed": total["exposed"] if timed else None,
                "expert_seconds_hidden_at_most": max(0.0, total["under_way"] - total["exposed"]) if timed else None}

    def _report(self, loss: Tensor) -> None:
        """Fills `metrics`; every `steps_per_print` steps logs a line; writes to DeepSpeed's monitors."""
        norm = self.get_global_grad_norm()
        worst = self._worst_violation()
        self.metrics = {"loss": loss.item(), "grad_norm": None if norm is None else float(norm), "lr": self.get_lr()[0],
                        "max_violation": None if worst < 0 else worst, **self._traffic_metrics()}
        every = self.steps_per_print()
        due = every is not None and self.global_steps % every == 0
        if due and self.global_rank == 0:
            seconds = self._seconds / every
            log_dist(
                f"steps: {self.global_steps} loss: {self.metrics['loss']:0.4f} iter time (s): {seconds:0.3f} "
                f"samples/sec: {self.train_batch_size() / seconds:0.3f}", ranks=[0])
        if due:
            self._seconds = 0.0
        if due and self.wall_clock_breakdown():
            self.timers.log(["pipeline", "reduce_gradients", "optimizer"])
        if self.monitor.enabled and self.global_rank == 0:
            names = {"loss": "train_loss", "lr": "lr", "grad_norm": "grad_norm", "max_violation": "max_violation"}
            self.monitor.write_events([(f"Train/Samples/{names[k]}", v, self.global_samples)
                                       for k, v in self.metrics.items() if k in names and v is not None])
