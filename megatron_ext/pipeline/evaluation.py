"""The forward-only plan of `eval_batch`, for any placement."""

from __future__ import annotations

from megatron_ext.pipeline.instructions import Compute, Pair, Plan


def forward_only(placement: list[list[int]], ranks: int, micro_batches: int) -> Plan:
    """Forwards of all directions, each rank in the order in which they can run if all take equally long.

    Args:
        placement: for each direction the list stage -> rank.
        ranks: P.
        micro_batches: of all directions together.
    """
    directions = len(placement)
    order: list[list[tuple[int, Compute | Pair]]] = [[] for _ in range(ranks)]
    for direction, stages in enumerate(placement):
        count = micro_batches // directions + (direction < micro_batches % directions)
        for micro_batch in range(count):
            for stage, rank in enumerate(stages):
                slot = directions * micro_batch + stage  # a rank works for each direction in turn
                order[rank].append((slot, Compute("F", direction, stage, micro_batch)))
    compute: list[list[Compute | Pair]] = [
        [instruction for _, instruction in sorted(rows, key=lambda row: (row[0], row[1].direction))] for rows in order]
    return Plan.from_compute("evaluation", placement, micro_batches, compute)
