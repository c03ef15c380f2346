"""The grid of ranks, as arithmetic (DeepSeek-V3 report, sections 3.2 and 3.2.1).

Letters: P pipeline ranks, D replicas of the pipeline, N ranks of an expert-parallel group; rank = stage_rank * D +
replica, DeepSpeed's own order with the pipeline outermost, so a block of expert-parallel ranks is contiguous and lies
in a node.

Under a bidirectional schedule the pipeline ranks i and P-1-i hold the same stages. They are replicas of each other:
their data-parallel group has 2D ranks, and everything that DeepSpeed shards over data parallelism is shared by the
pair. For DeepSpeed the "model-parallel" ranks are then the P/2 pairs, for together they hold every parameter exactly
once. Under a schedule of one direction every pipeline rank is such a holder, and its data-parallel group has D ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_ext.config.errors import ConfigError
from megatron_ext.parallel.placement import Placement, bidirectional


@dataclass(frozen=True)
class Topology:
    """P pipeline ranks x D replicas, experts split over N neighbouring replicas.

    Attributes:
        stages: P, as `pipeline.stages` in the config: the number of pipeline ranks.
        replicas: D.
        expert_parallel: N.
        placement: for each direction (stage -> pipeline rank); DualPipe's if not given.
    """

    stages: int
    replicas: int
    expert_parallel: int = 1
    placement: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.placement:
            object.__setattr__(self, "placement", _frozen(bidirectional(self.stages)))
        check_sizes(self.world_size, self.stages, self.expert_parallel, self.directions)

    @staticmethod
    def of_world(world_size: int, stages: int, expert_parallel: int = 1,
                 placement: Placement | None = None) -> Topology:
        """The topology that fills `world_size` ranks.

        Raises:
            ConfigError: P is odd under two directions or does not divide the world, or N does not divide D.
        """
        check_sizes(world_size, stages, expert_parallel, 2 if placement is None else len(placement))
        return Topology(stages, world_size // stages, expert_parallel, _frozen(placement or []))

    @property
    def world_size(self) -> int:
        return self.stages * self.replicas

    @property
    def directions(self) -> int:
        """1, or 2 if micro-batches enter from both ends."""
        return len(self.placement)

    @property
    def total_stages(self) -> int:
        """P v, the number of stages of the model: P times the chunks of a direction on each rank."""
        return len(self.placement[0])

    @property
    def holders(self) -> int:
        """How many ranks of a pipeline hold distinct parameters: P/2 mirrored pairs, or all P ranks."""
        return self.stages // self.directions

    @property
    def data_parallel_size(self) -> int:
        """Shards of the data: every direction of every replica."""
        return self.directions * self.replicas

    def stages_of(self, stage_rank: int) -> list[int]:
        """The stages whose parameters a pipeline rank holds, in order."""
        return sorted({s for place in self.placement for s, holder in enumerate(place) if holder == stage_rank})

    def stage_rank(self, rank: int) -> int:
        """0..P-1, the place of `rank` in its pipeline."""
        return rank // self.replicas

    def replica(self, rank: int) -> int:
        """0..D-1, the pipeline that `rank` belongs to."""
        return rank % self.replicas

    def rank_of(self, stage_rank: int, replica: int) -> int:
        return stage_rank * self.replicas + replica

    def holder(self, rank: int) -> int:
        """0..holders-1, whose parameters `rank` holds: its mirrored pair, or its place in the pipeline."""
        return self._holder_at(self.stage_rank(rank))

    def holder_of_stage(self, stage: int) -> int:
        """0..holders-1, who holds the parameters of `stage`."""
        return self._holder_at(self.placement[0][stage])

    def _holder_at(self, stage_rank: int) -> int:
        return min(stage_rank, self.stages - 1 - stage_rank) if self.directions == 2 else stage_rank

    def _mirrored(self, holder: int) -> list[int]:
        """The pipeline ranks with these parameters."""
        return [holder, self.stages - 1 - holder][:self.directions]

    def _halves(self) -> list[list[int]]:
        """Pipeline ranks that together hold every parameter once: each half, or all of them; in rank order."""
        ranks = list(range(self.stages))
        return [ranks[:self.holders], ranks[self.holders:]][:self.directions]

    def shard(self, direction: int, replica: int) -> int:
        """The data shard that `direction` of `replica` reads; under two directions also the data-parallel rank of the
        direction's first stage."""
        return direction * self.replicas + replica

    def shard_of(self, rank: int) -> int:
        """0..data_parallel_size-1, the place of `rank` among those with the same parameters."""
        return self.shard(int(self.stage_rank(rank) >= self.holders), self.replica(rank))

    # Every list below covers the world (each rank once), in the order in which all ranks must create the groups.

    def pipeline_groups(self) -> list[list[int]]:
        return [[self.rank_of(i, d) for i in range(self.stages)] for d in range(self.replicas)]

    def data_parallel_groups(self) -> list[list[int]]:
        """Per holder: its mirrored ranks of every replica, so that group rank = shard."""
        return [[self.rank_of(i, d) for i in self._mirrored(h) for d in range(self.replicas)]
                for h in range(self.holders)]

    def model_parallel_groups(self) -> list[list[int]]:
        """Per replica and half of the pipeline: every parameter once, in rank order as torch keeps groups."""
        return [[self.rank_of(i, d) for i in half] for d in range(self.replicas) for half in self._halves()]

    def expert_parallel_groups(self) -> list[list[int]]:
        n = self.expert_parallel
        return [[self.rank_of(i, block + k) for k in range(n)]
                for i in range(self.stages) for block in range(0, self.replicas, n)]

    def expert_data_parallel_groups(self) -> list[list[int]]:
        """Per holder and place k in an expert group: the replicas of the same experts, over its mirrored ranks."""
        n = self.expert_parallel
        return [[self.rank_of(i, d) for i in self._mirrored(h) for d in range(k, self.replicas, n)]
                for h in range(self.holders) for k in range(n)]

    def channels(self) -> list[str]:
        """Streams of messages: "F0" activations of direction 0, "B1" gradients of 1, "L0" labels of 0, ..."""
        return [f"{kind}{direction}" for kind in "FBL" for direction in range(self.directions)]

    def message_edges(self, channel: str) -> list[tuple[int, int]]:
        """(sender, receiver) of the messages of a channel, each once."""
        kind, place = channel[0], self.placement[int(channel[1])]
        hops = [(place[0], place[-1])] if kind == "L" else list(pairwise(place))
        if kind == "B":
            hops = [(b, a) for a, b in hops]
        found = dict.fromkeys((a, b) for a, b in hops if a != b)
        return [(self.rank_of(a, d), self.rank_of(b, d)) for d in range(self.replicas) for a, b in found]

    def tied_groups(self, stages: list[int]) -> list[list[int]]:
        """Ranks that sum the gradients of a parameter used by several `stages`, if several holders have those.

        One group per replica and half of the pipeline: the data-parallel sum over the halves then counts every use
        once. The first rank of a group is of the holder with the first use, which owns the parameter. Empty if one
        holder has all the uses, for then autograd has summed them already.
        """
        holders = list(dict.fromkeys(self.holder_of_stage(s) for s in stages))
        if len(holders) == 1:
            return []
        halves = zip(*map(self._mirrored, holders), strict=True)
        return [[self.rank_of(i, d) for i in half] for half in halves for d in range(self.replicas)]


def check_sizes(world_size: int, stages: int, expert_parallel: int, directions: int = 2) -> None:
    """Whether P pipeline ranks and expert-parallel groups of N fit the ranks of the job.

    Raises:
        ConfigError: P is odd under two directions or does not divide `world_size`, or N does not divide D.
    """
    key = "megatron_ext.pipeline.stages"
    if stages < directions or stages % directions:
        raise ConfigError(key, stages, "a bidirectional pipeline needs an even number of ranks, at least 2"
                          if directions == 2 else "a pipeline needs at least one rank")
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
                          "mirrored ranks run different stages at the same moment and cannot share an expert group"
                          if directions == 2 else "experts are split over the replicas of one stage")


def _frozen(placement: Placement) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, placement))
