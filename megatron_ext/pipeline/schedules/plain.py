"""Schedules of one direction with one stage per rank: GPipe, 1F1B and ZB-H1.

Rank r holds stage r of P; any P and any number m of micro-batches work.

    gpipe   all forwards, then all backwards                     bubble (P-1)(F+B), m activations
    1f1b    a backward as soon as there is one (PipeDream-Flush) bubble (P-1)(F+B), P activations
    zb_h1   1F1B that puts W's into the bubble (arXiv 2401.10241) bubble (P-1)(F+B-2W) if F = I, P activations
"""

from __future__ import annotations

from megatron_ext.parallel.placement import ring
from megatron_ext.pipeline.instructions import Compute, Pair, Plan

Order = list[Compute | Pair]


def gpipe(stages: int, micro_batches: int) -> Plan:
    """All forwards, then all backwards."""
    orders: list[Order] = [
        [Compute(kind, 0, rank, k) for kind in ("F", "B") for k in range(micro_batches)] for rank in range(stages)
    ]
    return Plan.from_compute("gpipe", ring(stages), micro_batches, orders, micro_batches, 0)


def one_f_one_b(stages: int, micro_batches: int) -> Plan:
    """Rank r runs P-1-r forwards ahead, then one forward and one backward in turn."""
    orders: list[Order] = []
    for rank in range(stages):
        ahead = min(stages - 1 - rank, micro_batches)
        order: Order = [Compute("F", 0, rank, k) for k in range(ahead)]
        for k in range(micro_batches):
            if ahead + k < micro_batches:
                order.append(Compute("F", 0, rank, ahead + k))
            order.append(Compute("B", 0, rank, k))
        orders.append(order)
    return Plan.from_compute("1f1b", ring(stages), micro_batches, orders, min(stages, micro_batches), 0)


def zb_h1(stages: int, micro_batches: int) -> Plan:
    """Rank r banks r weight gradients for its drain, which is that much longer than rank 0's."""
    orders: list[Order] = []
    for rank in range(stages):
        ahead, done = min(stages - rank, micro_batches), 0
        order: Order = [Compute("F", 0, rank, k) for k in range(ahead)]
        for k in range(micro_batches):
            order.append(Compute("I", 0, rank, k))
            if k >= rank:
                order.append(Compute("W", 0, rank, done))
                done += 1
            if ahead + k < micro_batches:
                order.append(Compute("F", 0, rank, ahead + k))
        order += [Compute("W", 0, rank, k) for k in range(done, micro_batches)]
        orders.append(order)
    limit = min(stages, micro_batches)
    return Plan.from_compute("zb_h1", ring(stages), micro_batches, orders, limit, limit)
