"""Optimizers that DeepSpeed lacks, and the count of what they hold."""

from megatron_ext.optimizer.adamw import AdamW
from megatron_ext.optimizer.memory import OptimizerStateBytes, optimizer_state_bytes

__all__ = ["AdamW", "OptimizerStateBytes", "optimizer_state_bytes"]
