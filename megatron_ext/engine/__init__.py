"""The DeepSpeed engine: set-up, the training step, save and load."""

from megatron_ext.engine.engine import PipelineEngine
from megatron_ext.engine.initialize import init_distributed, initialize

__all__ = ["PipelineEngine", "init_distributed", "initialize"]
