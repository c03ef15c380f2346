"""The orders of torch.distributed.pipelining's schedules, as plans of ours."""

from __future__ import annotations

import logging

from torch.distributed.pipelining import _schedule_visualizer as visualizer

from megatron_ext.pipeline import Compute, Pair, Plan


def torch_order(name: str, ranks: int, micro_batches: int, stages_per_rank: int) -> Plan:
    """What torch's schedule of this name runs (its class without "Schedule"); it has one direction."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it logs every order as a warning
    try:
        rows = visualizer.get_schedule_ops(name, ranks, micro_batches, num_stages_per_rank=stages_per_rank)
    finally:
        logging.disable(before)
    place = [-1] * (ranks * stages_per_rank)
    orders: list[list[Compute | Pair]] = []
    for rank, row in enumerate(rows):
        orders.append([])
        for action in row:
            if action is None:
                continue
            parts = [Compute(a.computation_type.value, 0, a.stage_index, a.microbatch_index)
                     for a in action.sub_actions or (action,)]
            for part in parts:
                place[part.stage] = rank
            orders[-1].append(Pair(*parts) if len(parts) == 2 else parts[0])
    return Plan.from_compute(f"torch's {name}", [place], micro_batches, orders)
