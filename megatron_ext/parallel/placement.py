"""Where the stages of a pipeline lie: for each direction the list stage -> pipeline rank.

Letters: P pipeline ranks, v chunks: the stages of one direction that a rank holds, each 1/(P v) of the model.

    ring           rank s mod P                            interleaved 1F1B; v = 1 is the plain pipeline
    wave           0 .. P-1, P-1 .. 0, 0 .. P-1, ...       turns at both ends; v = 2 is the V of ZB-V and DualPipeV
    bidirectional  a ring and its mirror image             DualPipe (v = 1): two directions, every stage on two ranks
"""

from __future__ import annotations

Placement = list[list[int]]


def ring(ranks: int, chunks: int = 1) -> Placement:
    """One direction; every round through the ranks starts at rank 0."""
    return [[stage % ranks for stage in range(ranks * chunks)]]


def wave(ranks: int, chunks: int = 2) -> Placement:
    """One direction; a stage and the next lie on the same rank where the wave turns."""
    return [[rank if chunk % 2 == 0 else ranks - 1 - rank for chunk in range(chunks) for rank in range(ranks)]]


def bidirectional(ranks: int, chunks: int = 1) -> Placement:
    """Two directions through the same stages: ranks r and P-1-r hold the same ones, and are replicas of each other."""
    [there] = ring(ranks, chunks)
    return [there, [ranks - 1 - rank for rank in there]]
