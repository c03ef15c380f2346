"""DeepSeek-V2 and V3: configuration, layers for the pipeline, one module for one process, the loss."""

from megatron_ext.config.errors import CheckpointError
from megatron_ext.models.config import DeepSeekV3Config
from megatron_ext.models.deepseek_v3 import DeepSeekV3, deepseek_v3
from megatron_ext.models.loss import cross_entropy

__all__ = ["CheckpointError", "DeepSeekV3", "DeepSeekV3Config", "cross_entropy", "deepseek_v3"]
