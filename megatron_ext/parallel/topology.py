"""The grid of ranks, as arithmetic (DeepSeek-V3 report, sections 3.2 and 3.2.1).

Letters: P pipeline ranks, D replicas of the pipeline, N ranks of an expert-parallel group; rank = stage_rank * D +
replica, DeepSpeed's own order with the pipeline outermost, so a block of expert-parallel ranks is contiguous and lies
in a node.

Under a bidirectional schedule the pipeline ranks i and P-1-i hold the same two stages. They are replicas of each
other: their data-parallel group has 2D ranks, and everything that DeepSpeed shards over data parallelism is shared by
the pair. For DeepSpeed the "model-parallel" ranks are then the P/2 pairs, for together they hold every parameter
exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_ext.config.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """P pipeline ranks x D replicas, experts split over N neighbouring replicas; pipeline ranks mirrored."""

    stages: int
    replicas: int
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        check_sizes(self.world_size, self.stages, self.expert_parallel)

    @staticmethod
    def of_world(world_size: int, stages: int, expert_parallel: int = 1) -> Topology:
        """The topology that fills `world_size` ranks.

        Raises:
            ConfigError: P is odd or does not divide the world, or N does not divide D.
        """
        check_sizes(world_size, stages, expert_parallel)
        return Topology(stages, world_size // stages, expert_parallel)

    @property
    def world_size(self) -> int:
        return self.stages * self.replicas

    @property
    def pairs(self) -> int:
        """P/2, the number of mirrored pairs: of distinct holders of parameters."""
        return self.stages // 2

    @property
    def data_parallel_size(self) -> int:
        """2D: both directions of every replica."""
        return 2 * self.replicas

    def stage_rank(self, rank: int) -> int:
        """0..P-1, the place of `rank` in its pipeline."""
        return rank // self.replicas

    def replica(self, rank: int) -> int:
        """0..D-1, the pipeline that `rank` belongs to."""
        return rank % self.replicas

    def rank_of(self, stage_rank: int, replica: int) -> int:
        return stage_rank * self.replicas + replica

    def pair(self, rank: int) -> int:
        """0..P/2-1, the mirrored pair whose parameters `rank` holds."""
        return self.pair_of_stage(self.stage_rank(rank))

    def pair_of_stage(self, stage: int) -> int:
        """0..P/2-1, the mirrored pair that holds the parameters of `stage`."""
        return min(stage, self.stages - 1 - stage)

    def shard(self, direction: int, replica: int) -> int:
        """0..2D-1, the data shard that `direction` of `replica` reads: the data-parallel rank of its first stage."""
        return direction * self.replicas + replica

    # Every list below covers the world (each rank once), in the order in which all ranks must create the groups.

    def pipeline_groups(self) -> list[list[int]]:
        return [[self.rank_of(i, d) for i in range(self.stages)] for d in range(self.replicas)]

    def data_parallel_groups(self) -> list[list[int]]:
        """Per pair: both mirrored ranks of every replica, so that group rank = shard."""
        return [[self.rank_of(i, d) for i in (p, self.stages - 1 - p) for d in range(self.replicas)]
                for p in range(self.pairs)]

    def model_parallel_groups(self) -> list[list[int]]:
        """Per replica and half of the pipeline: one holder of every parameter, in rank order as torch keeps groups."""
        halves = (range(self.pairs), range(self.pairs, self.stages))
        return [[self.rank_of(i, d) for i in half] for d in range(self.replicas) for half in halves]

    def expert_parallel_groups(self) -> list[list[int]]:
        n = self.expert_parallel
        return [[self.rank_of(i, block + k) for k in range(n)]
                for i in range(self.stages) for block in range(0, self.replicas, n)]

    def expert_data_parallel_groups(self) -> list[list[int]]:
        """Per pair and place k in an expert group: the replicas of the same experts, over both mirrored ranks."""
        n = self.expert_parallel
        return [[self.rank_of(i, d) for i in (p, self.stages - 1 - p) for d in range(k, self.replicas, n)]
                for p in range(self.pairs) for k in range(n)]

    def message_edges(self, channel: str) -> list[tuple[int, int]]:
        """(sender, receiver) of the messages of a channel: "F0" activations of direction 0, "B1" gradients of 1, ..."""
        kind, direction = channel[0], int(channel[1])
        order = range(self.stages) if direction == 0 else range(self.stages - 1, -1, -1)
        pairs = [(order[0], order[-1])] if kind == "L" else list(pairwise(order))
        if kind == "B":
            pairs = [(b, a) for a, b in pairs]
        return [(self.rank_of(a, d), self.rank_of(b, d)) for d in range(self.replicas) for a, b in pairs]

    def tied_groups(self, stages: list[int]) -> list[list[int]]:
        """Ranks that sum the gradients of a parameter used by several `stages`, if those lie on more than one pair.

        One group per replica and half of the pipeline: the data-parallel sum over the two halves then counts every use
        once. The first rank of a group is of the pair with the first use, which owns the parameter. Empty if one pair
        holds all the uses, for then autograd has summed them already.
        """
        pairs = list(dict.fromkeys(self.pair_of_stage(s) for s in stages))
        if len(pairs) == 1:
            return []
        mirrored = [self.stages - 1 - p for p in pairs]
        return [[self.rank_of(i, d) for i in half] for d in range(self.replicas) for half in (pairs, mirrored)]


def check_sizes(world_size: int, stages: int, expert_parallel: int) -> None:
    """Whether P pipeline ranks and expert-parallel groups of N fit the ranks of the job.

    Raises:
        ConfigError: P is odd or does not divide `world_size`, or N does not divide D.
    """
    key = "megatron_ext.pipeline.stages"
    if stages < 2 or stages % 2:
        raise ConfigError(key, stages, "a bidirectional pipeline needs an even number of ranks, at least 2")
    if world_size % stages:
        fewer = world_size // stages * stages
        raise ConfigError(key, stages, f"must divide the {world_size} ranks of this job: "
                          f"{world_size} = {stages} x {world_size // stages} + {world_size % stages}",
                          f"start {fewer} or {fewer + stages} ranks" if fewer else f"start {stages} ranks")
    replicas = world_size // stages
    if expert_parallel < 1 or replicas % expert_parallel:
        raise ConfigError("megatron_ext.expert_parallel.size", expert_parallel,
                          "must divide the number of replicas of the pipeline, "
                          f"{world_size} ranks / {stages} stages = {replicas}",
                          "mirrored ranks run different stages at the same moment and cannot share an expert group")
