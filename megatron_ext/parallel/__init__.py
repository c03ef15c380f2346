"""Where every rank stands: topology, process groups, the `mpu` for DeepSpeed, the private folder of JIT builds."""

from megatron_ext.parallel.agreement import agree, agreed
from megatron_ext.parallel.expert_parallel import ExpertParallel
from megatron_ext.parallel.groups import ProcessGroups
from megatron_ext.parallel.mpu import PipelineUnit
from megatron_ext.parallel.topology import Topology

__all__ = ["ExpertParallel", "PipelineUnit", "ProcessGroups", "Topology", "agree", "agreed"]
