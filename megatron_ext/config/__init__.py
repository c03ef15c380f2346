"""The JSON configuration: the `megatron_ext` section, the rules across sections, and the errors that users see."""

from megatron_ext.config.errors import CheckpointError, ConfigError, UserError
from megatron_ext.config.rules import Batch, check_deepspeed_config, load_config, resolve_batch
from megatron_ext.config.schema import SECTION, LoadSection, MegatronExtConfig, parse_section

__all__ = ["SECTION", "Batch", "CheckpointError", "ConfigError", "LoadSection", "MegatronExtConfig",
           "UserError", "check_deepspeed_config", "load_config", "parse_section", "resolve_batch"]
