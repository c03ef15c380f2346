"""Checkpoints on disk."""

from megatron_ext.config.errors import CheckpointError

__all__ = ["CheckpointError"]
