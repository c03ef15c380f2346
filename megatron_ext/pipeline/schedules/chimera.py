"""Chimera (arXiv 2107.06925): both ends feed a pipeline of full backwards, for comparison with DualPipe.

Micro-batches come in units of P, half of them per direction. A direction starts one every second slot, so that with
F = B the slots of the other direction are exactly those that it leaves free, and units follow each other without a gap.
Backwards are longer than that, so the bubble grows with m. Rank r holds stage r of direction 0 and P-1-r of
direction 1.
"""

from __future__ import annotations

from megatron_ext.parallel.placement import bidirectional
from megatron_ext.pipeline.instructions import Compute, Pair, Plan


def chimera(stages: int, micro_batches: int) -> Plan:
    """The plan for P = `stages` (even) and m = `micro_batches`, a multiple of P, of both directions together."""
    half = stages // 2
    orders: list[list[Compute | Pair]] = []
    for rank in range(stages):
        slots: list[tuple[int, Compute]] = []
        for direction, stage in enumerate((rank, stages - 1 - rank)):
            for micro_batch in range(micro_batches // 2):
                unit, place = divmod(micro_batch, half)
                entered = 2 * (unit * stages + place)
                slots.append((entered + stage, Compute("F", direction, stage, micro_batch)))
                slots.append((entered + 2 * stages - 1 - stage, Compute("B", direction, stage, micro_batch)))
        orders.append([compute for _, compute in sorted(slots)])
    return Plan.from_compute("chimera", bidirectional(stages), micro_batches, orders, stages, 0)
