"""The training system of DeepSeek-V3 as a DeepSpeed extension: DualPipe, MLA, balanced experts, FP8, BF16 moments.

    model = megatron_ext.PipelineModule(layers=specs, num_stages=4, loss_fn=loss)
    engine, optimizer, loader, scheduler = megatron_ext.initialize(model=model, training_data=data, config="ds.json")
    loss = engine.train_batch()

Parts are imported when they are first asked for: `import megatron_ext` alone imports no DeepSpeed. It sets one variable
of the environment, TORCH_EXTENSIONS_DIR, to a folder of its own unless it is set (parallel/extensions.py says why).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_ext.parallel.extensions import prepare_extensions

if TYPE_CHECKING:
    from megatron_ext.config import ConfigError, UserError
    from megatron_ext.engine import PipelineEngine, init_distributed, initialize
    from megatron_ext.pipeline.module import PipelineModule

__version__ = "0.1.0"
__all__ = ["ConfigError", "PipelineEngine", "PipelineModule", "UserError", "init_distributed",
           "initialize"]

_HOMES = {
    "ConfigError": "megatron_ext.config",
    "PipelineEngine": "megatron_ext.engine",
    "PipelineModule": "megatron_ext.pipeline.module",
    "UserError": "megatron_ext.config",
    "init_distributed": "megatron_ext.engine",
    "initialize": "megatron_ext.engine",
}
_PARTS = ("checkpoint", "cli", "comm", "config", "data", "engine", "fp8", "layers", "models", "optimizer", "parallel",
          "pipeline")

prepare_extensions()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"megatron_ext.{name}")
    raise AttributeError(f"module 'megatron_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PARTS})
