"""The model-parallel unit through which DeepSpeed learns which ranks hold the same parameters.

DeepSpeed asks an `mpu` for its data-parallel group (ZeRO shards over it), its model-parallel group (gradient norms
and overflow are summed over it) and a model-parallel rank (it names checkpoint files). With the data-parallel group
of size 2D and the P/2 mirrored pairs as model-parallel ranks (of size D, and the P ranks of the pipeline, under one
direction), stock ZeRO-1/2, clipping, offload and universal checkpoints are right as they are. Method names are
DeepSpeed's (`deepspeed/utils/groups.py`, `bwc.py`); checked against 0.19.8.
"""

from __future__ import annotations

from torch.distributed import ProcessGroup

from megatron_ext.parallel.groups import ProcessGroups


class PipelineUnit:
    """`mpu` of a rank in a pipeline. No tensor, slice or sequence parallelism."""

    def __init__(self, groups: ProcessGroups):
        self.groups = groups
        self.topology = groups.topology

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.groups.data_parallel

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.groups.data_parallel_ranks

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data_parallel_size

    def get_data_parallel_rank(self) -> int:
        return self.groups.data_parallel_ranks.index(self.groups.rank)

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.groups.model_parallel

    def get_model_parallel_world_size(self) -> int:
        return self.topology.holders

    def get_model_parallel_rank(self) -> int:
        return self.topology.holder(self.groups.rank)

    # The pipeline's "world" is the number of distinct holders of parameters: as many mp_rank files as a checkpoint has.

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.topology.holders

    def get_pipe_parallel_world_size(self) -> int:
        return self.topology.holders

    def get_pipe_parallel_rank(self) -> int:
        return self.get_model_parallel_rank()

    # No tensor parallelism: what DeepSpeed asks to find out which parameters a model-parallel group has several times.

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    def get_slice_parallel_rank(self) -> int:
        return 0

    def get_slice_parallel_world_size(self) -> int:
        return 1
