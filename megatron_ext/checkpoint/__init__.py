"""Checkpoints on disk."""

from megatron_ext.checkpoint.native import CheckpointError

__all__ = ["CheckpointError"]
