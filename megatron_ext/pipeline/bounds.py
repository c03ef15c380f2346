"""How short a step can be at best: proofs that a schedule is nearly as good as any of its placement, or of any.

Consider one rank. It cannot begin before s, when its first input can be there, nor run its first input gradient before
b, when a micro-batch can have gone through all stages and back to it. Before b it runs forwards alone, say a of them,
each of length F, and frees no activation, so a is at most the memory limit. None of these a is in a pair, so there are
a pairs less than there could be, each of which would have saved the gain F + I + W - pair. With n forwards in all

    step >= s + n (F + I + W) - (n - a) gain + max(0, b - s - a F)

for some a between 0 and the limit; the bound is the least over a, and the largest over the ranks. A placement gives s
and b of every rank. For any placement: where each stage is on c ranks, the last stages of the P ranks are at least P/c
different ones, so that on some rank no stage is among the last ceil(P/c) - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from megatron_ext.parallel.placement import Placement
from megatron_ext.pipeline.simulator import Times


def lower_bound(placement: Placement, micro_batches: int, times: Times, memory_limit: float | None = None) -> float:
    """No order on this placement is shorter.

    Args:
        placement: for each direction the list stage -> rank.
        micro_batches: m, of all directions together.
        memory_limit: activations a rank may hold, in its whole share of the model for one micro-batch.
    """
    stages, ranks = len(placement[0]), max(placement[0]) + 1
    lengths = _lengths(times, stages, stages // ranks)
    count, rest = divmod(micro_batches, len(placement))
    begin, turn = [inf] * ranks, [inf] * ranks  # s and b
    runs: list[list[float]] = [[] for _ in range(ranks)]  # lengths of the stages that a rank's forwards are of
    for direction, place in enumerate(placement):
        here = count + (direction < rest)
        if not here:
            continue
        hops = [times.message * (place[stage] != place[stage + 1]) for stage in range(stages - 1)] + [0.0]
        now = 0.0
        for stage, rank in enumerate(place):
            begin[rank] = min(begin[rank], now)
            now += times.forward * lengths[stage] + hops[stage]
            runs[rank] += [lengths[stage]] * here
        for stage in reversed(range(stages)):
            turn[place[stage]] = min(turn[place[stage]], now)
            now += times.input_grad * lengths[stage] + hops[stage - 1]  # hops[-1] is 0, as after stage 0 nothing comes
    slots = inf if memory_limit is None else int(memory_limit * (stages // ranks) + 1e-9)
    return max(_rank_bound(times, runs[rank], slots, begin[rank], turn[rank]) for rank in range(ranks) if runs[rank])


def any_placement_bound(
    ranks: int, micro_batches: int, chunks: int, copies: int, times: Times, memory_limit: float | None = None
) -> float:
    """No order on any placement is shorter.

    Args:
        ranks: P.
        micro_batches: m, of all directions together.
        chunks: the model is cut into P x `chunks` stages, and a rank's share is as many of them.
        copies: on how many ranks each stage lies.
        memory_limit: as for `lower_bound`.
    """
    lengths = _lengths(times, ranks * chunks, chunks)
    deeper = -(-ranks // copies) - 1
    turn = times.forward * sum(lengths) + times.input_grad * sum(lengths[len(lengths) - deeper :])
    slots = inf if memory_limit is None else int(memory_limit * chunks + 1e-9)
    return _rank_bound(times, [min(lengths)] * (chunks * micro_batches), slots, 0.0, turn)


def _lengths(times: Times, stages: int, chunks: int) -> list[float]:
    return [length / chunks for length in times.lengths(stages)]


def _rank_bound(times: Times, runs: Sequence[float], slots: float, begin: float, turn: float) -> float:
    """The formula above; `runs` has the length of the stage of each of the n forwards."""
    gain = max(times.gain, 0.0)
    paired = (times.forward + times.input_grad + times.weight_grad - gain) * sum(runs)
    shortest, longest = min(runs), max(runs)
    return begin + paired + min(
        gain * shortest * alone + max(0.0, turn - begin - times.forward * longest * alone)
        for alone in range(int(min(slots, len(runs))) + 1)
    )
