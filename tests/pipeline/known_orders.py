"""Two published schedules for comparison: 1F1B and ZB-H1 (arXiv 2401.10241), on one direction of P ranks."""

from __future__ import annotations

from megatron_ext.pipeline import Compute, Pair, Plan


def _plan(name: str, micro_batches: int, orders: list[list[Compute | Pair]]) -> Plan:
    return Plan.from_compute(name, [list(range(len(orders)))], micro_batches, orders)


def one_f_one_b(stages: int, micro_batches: int) -> Plan:
    orders: list[list[Compute | Pair]] = []
    for rank in range(stages):
        warm_up = min(stages - rank - 1, micro_batches)
        order: list[Compute | Pair] = [Compute("F", 0, rank, k) for k in range(warm_up)]
        for k in range(micro_batches):
            if warm_up + k < micro_batches:
                order.append(Compute("F", 0, rank, warm_up + k))
            order.append(Compute("B", 0, rank, k))
        orders.append(order)
    return _plan("1f1b", micro_batches, orders)


def zb_h1(stages: int, micro_batches: int) -> Plan:
    orders: list[list[Compute | Pair]] = []
    for rank in range(stages):
        warm_up, done = min(stages - rank, micro_batches), 0
        order: list[Compute | Pair] = [Compute("F", 0, rank, k) for k in range(warm_up)]
        for k in range(micro_batches):
            order.append(Compute("I", 0, rank, k))
            if k >= rank:  # later ranks bank more W's, to fill their longer drain
                order.append(Compute("W", 0, rank, done))
                done += 1
            if warm_up + k < micro_batches:
                order.append(Compute("F", 0, rank, warm_up + k))
        order += [Compute("W", 0, rank, k) for k in range(done, micro_batches)]
        orders.append(order)
    return _plan("zb_h1", micro_batches, orders)
