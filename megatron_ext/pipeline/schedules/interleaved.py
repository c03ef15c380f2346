"""Interleaved 1F1B (Megatron-LM, arXiv 2104.04473): v chunks of the model on every rank, P micro-batches in turn.

Chunk j of rank r is stage jP + r. Micro-batches go round the ranks in groups of P: each chunk runs a whole group before
the next chunk, so m must be a multiple of P. The bubble is that of 1F1B divided by v. `interleaved_paired` runs one
more forward ahead, so that every forward and backward of the steady state is a pair of different micro-batches whose
all-to-alls hide behind each other, as Megatron-LM does for experts (`--overlap-moe-expert-parallel-comm`).
Rank 0 holds P(1 + 1/v) - 1/v activations, with pairs 1/v more.
"""

from __future__ import annotations

from megatron_ext.parallel.placement import ring
from megatron_ext.pipeline.instructions import Compute, Pair, Plan


def interleaved(stages: int, micro_batches: int, chunks: int, paired: bool = False) -> Plan:
    """The plan for m = `micro_batches`, a multiple of P = `stages`, and v = `chunks` of at least 2."""
    total = micro_batches * chunks
    orders: list[list[Compute | Pair]] = []
    for rank in range(stages):
        ahead = min(2 * (stages - 1 - rank) + (chunks - 1) * stages + paired, total)
        forwards, backwards = [], []
        for index in range(total):
            group, place = divmod(index, stages * chunks)
            chunk, offset = divmod(place, stages)
            micro_batch = group * stages + offset
            forwards.append(Compute("F", 0, chunk * stages + rank, micro_batch))
            backwards.append(Compute("B", 0, (chunks - 1 - chunk) * stages + rank, micro_batch))
        order: list[Compute | Pair] = list(forwards[:ahead])
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            order += [Pair(forward, backward)] if paired else [forward, backward]
        orders.append([*order, *backwards[total - ahead :]])
    limit = min((chunks + 1) * stages - 1, total) / chunks
    if paired:
        limit = min((chunks + 1) * stages, total) / chunks
    name = "interleaved_paired" if paired else "interleaved"
    return Plan.from_compute(name, ring(stages, chunks), micro_batches, orders, limit, 0)
