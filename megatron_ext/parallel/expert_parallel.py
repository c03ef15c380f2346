"""Which experts of a layer live on this rank, and the group tokens travel through (DeepSeek-V3 report, section 3.2).

Letters: E experts of a layer, N ranks of the expert-parallel group; this rank holds E/N neighbouring experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup

from megatron_ext.config.errors import ConfigError
from megatron_ext.parallel.layout import NodeLayout


@dataclass(frozen=True)
class ExpertParallel:
    """One rank's place in its expert-parallel group.

    Attributes:
        group: the process group, or None when every expert is here.
        size: N, ranks in the group.
        rank: this rank's number in the group.
        name: the name under which DeepSpeed knows the group, `ep_size_<N>`; experts carry it as `group_name`.
            None outside an engine, where parameters are left unmarked.
        layout: which ranks share a node, if that is known.
        inter: the ranks of equal local number, one on each node; None if there is one node, or one rank on each.
        intra: the ranks of this node; likewise.
    """

    group: ProcessGroup | None
    size: int
    rank: int
    name: str | None = None
    layout: NodeLayout | None = None
    inter: ProcessGroup | None = None
    intra: ProcessGroup | None = None

    @staticmethod
    def single() -> ExpertParallel:
        """All experts in one process, no communication."""
        return ExpertParallel(group=None, size=1, rank=0)

    def expert_range(self, num_experts: int) -> tuple[int, int]:
        """First and one past the last of this rank's experts.

        Raises:
            ConfigError: if N does not divide `num_experts`.
        """
        if num_experts % self.size:
            raise ConfigError("megatron_ext.expert_parallel.size", self.size,
                              f"must divide the {num_experts} experts of a layer")
        local = num_experts // self.size
        return self.rank * local, (self.rank + 1) * local
