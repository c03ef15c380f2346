"""Rules that no single key can state: between our section and DeepSpeed's, and between the batch sizes.

Nothing here needs a process group or DeepSpeed, so a job that cannot work ends before anything slow has started, on all
ranks with the same message. A section of DeepSpeed keeps DeepSpeed's meaning; what is refused is what our engine would
otherwise ignore in silence. Letters: D replicas of the pipeline.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import MegatronExtConfig


def load_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The ds_config as a dict of its own, from a file or a dict.

    A file is JSON; one that is not is read as Hjson, as DeepSpeed does (comments, trailing commas).

    Raises:
        ConfigError: no such file, neither JSON nor Hjson, a key given twice, or no object at the top.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if not isinstance(config, (str, Path)):
        raise ConfigError("config", config, "must be the path of a JSON file, or a dict")
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("config", str(path), "there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"cannot be read: {error}") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError("config", str(path),
                                  f"the key {key!r} is given twice, as {seen[key]!r} and {value!r}")
            seen[key] = value
        return seen

    document = _parse(text, path, unique)
    if not isinstance(document, dict):
        raise ConfigError("config", str(path), f"must hold a JSON object, not {type(document).__name__}")
    return document


def _parse(text: str, path: Path, unique: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        import hjson  # type: ignore[import-untyped]  # comes with DeepSpeed; plain JSON does not need it

        try:
            return hjson.loads(text, object_pairs_hook=unique)
        except hjson.HjsonDecodeError:
            raise ConfigError("config", str(path),
                              f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None


@dataclass(frozen=True)
class Batch:
    """The batch sizes in force: train = micro x accumulation x 2D, for both directions read their own data."""

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def resolve_batch(ds_config: Mapping[str, Any], data_parallel_size: int) -> Batch:
    """The three batch sizes from the one to three that are given, by DeepSpeed's rules.

    Args:
        ds_config: the whole configuration.
        data_parallel_size: 2D.

    Raises:
        ConfigError: a size that is no positive integer; neither of the batch sizes given; sizes that do not multiply.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for key in keys:
        value = ds_config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(key, value, "must be an integer of at least 1", _auto_hint(value))
    train: Any = ds_config.get(keys[0])
    micro: Any = ds_config.get(keys[1])
    steps: Any = ds_config.get(keys[2])
    if train is None and micro is None:
        raise ConfigError(keys[0], None, f"is needed, or {keys[1]}")
    if steps is None:
        steps = 1 if train is None or micro is None else train // (micro * data_parallel_size)
    if micro is None:
        micro = train // (data_parallel_size * steps)
    product = micro * steps * data_parallel_size
    if train is not None and (train != product or not product):
        raise ConfigError(keys[0], train, f"must be {keys[1]} x {keys[2]} x data-parallel ranks",
                          f"here {micro} x {steps} x {data_parallel_size} = {product} (a replica counts once per "
                          "direction)")
    return Batch(product, micro, steps)


# key: what it asks for, and what to do instead. Refused when switched on.
_SWITCHES: Mapping[str, tuple[str, str]] = {
    "fp16.enabled": ("FP16 is not supported", 'use "bf16": {"enabled": true}'),
    "torch_autocast.enabled": ("autocast does not reach the layers of a pipeline", 'use "bf16": {"enabled": true}'),
    "expert_parallel.enabled": ("DeepSpeed's AutoEP is not supported", "set megatron_ext.expert_parallel.size"),
    "flops_profiler.enabled": ("DeepSpeed's profiler hooks a forward that a pipeline has not", "remove the section"),
    "curriculum_learning.enabled": ("DeepSpeed's curriculum acts in a forward that a pipeline has not",
                                    "remove the section"),
    "data_efficiency.enabled": ("DeepSpeed's data efficiency acts in its own loader and forward", "remove the section"),
    "hybrid_engine.enabled": ("the hybrid engine would take the place of the pipeline engine", "remove the section"),
}
# Refused above one.
_DEGREES: Mapping[str, str] = {
    "tensor_parallel.autotp_size": "tensor", "tensor_parallel.tp.tp_size": "tensor",
    "tensor_parallel.tensor_parallel.tp_size": "tensor", "tensor_parallel_size": "tensor",
    "sequence_parallel_size": "sequence", "context_parallel_size": "context",
}
# Refused when there at all: DeepSpeed 0.19 removed them and stops too, later and for some with a traceback.
_REMOVED: Mapping[str, str] = {"amp": 'use "bf16"', "elasticity": "set the batch sizes directly"}

_ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode", "amsgrad", "torch_adam",
                "fp32_optimizer_states")


def check_deepspeed_config(ds_config: Mapping[str, Any], section: MegatronExtConfig) -> None:
    """Refuses what DeepSpeed would do and our engine cannot, and what contradicts our section.

    Raises:
        ConfigError: for the first rule broken.
    """
    for key, hint in _REMOVED.items():
        if key in ds_config:
            raise ConfigError(key, ds_config[key], "DeepSpeed has removed this section", hint)
    for key in ("fp8", "kernels", "recompute", "router", "ema", "load"):
        if key in ds_config:  # DeepSpeed has no such sections, and ignores them
            raise ConfigError(key, ds_config[key], "is a section of megatron_ext", f"move it to megatron_ext.{key}")
    for key, (rule, hint) in _SWITCHES.items():
        if _is_on(value := _lookup(ds_config, key)):
            raise ConfigError(key, value, rule, hint)
    for key, kind in _DEGREES.items():
        if (value := _lookup(ds_config, key)) not in (None, 0, 1):
            raise ConfigError(key, value, f"{kind} parallelism is not supported",
                              "the ranks are divided into pipeline stages, replicas and experts")
    _check_pipeline(section)
    _check_recompute(section)
    _check_load(section)
    _check_zero(ds_config)
    _check_numbers(ds_config)
    _check_moments(ds_config, section)


def _check_recompute(section: MegatronExtConfig) -> None:
    """RMSNorm keeps its input alone whether it is listed or not, SwiGLU its inputs in FP8."""
    if "swiglu" in section.recompute and not section.fp8.enabled:
        raise ConfigError("megatron_ext.recompute", list(section.recompute), "swiglu is recomputed with FP8 only",
                          'set megatron_ext.fp8.enabled, or recompute "mlp"')


def _check_load(section: MegatronExtConfig) -> None:
    for key in ("format", "config", "optimizer", "follow_links"):
        if section.load.path is None and section.load.given(key) is not None:
            raise ConfigError(f"megatron_ext.load.{key}", section.load.given(key), "there is nothing to load",
                              "set megatron_ext.load.from, or remove the key")


def _check_pipeline(section: MegatronExtConfig) -> None:
    pipeline = section.pipeline
    if pipeline.placement is not None and pipeline.schedule != "auto":
        raise ConfigError("megatron_ext.pipeline.placement", pipeline.placement,
                          f'is for the schedule "auto"; {pipeline.schedule!r} has a placement of its own',
                          "remove one of the two")


def _check_zero(ds_config: Mapping[str, Any]) -> None:
    zero = ds_config.get("zero_optimization")
    if isinstance(zero, bool):  # DeepSpeed's oldest form, true for stage 1
        zero = None
    if (value := ds_config.get("managed_gradient_accumulation", True)) is not True:
        raise ConfigError("managed_gradient_accumulation", value, "train_batch owns the gradient accumulation",
                          "remove the key")
    if zero is None:
        return
    stage = _lookup(ds_config, "zero_optimization.stage")
    if stage == 3:
        raise ConfigError("zero_optimization.stage", stage, "ZeRO-3 is not supported: mirrored ranks run different "
                          "stages at the same moment and cannot gather each other's parameters", "use 1 or 2")
    if stage is not None and (type(stage) is not int or not 0 <= stage <= 2):
        raise ConfigError("zero_optimization.stage", stage, "must be 0, 1 or 2")
    for key in ("zero_optimization.offload_param", "zero_optimization.cpu_offload_param", "zero_optimization.zenflow"):
        value = _lookup(ds_config, key)
        if value and not (isinstance(value, Mapping) and value.get("device", None) == "none"):
            raise ConfigError(key, value, "is not supported", 'use "offload_optimizer" for the optimizer state')


def _check_numbers(ds_config: Mapping[str, Any]) -> None:
    """Strings where DeepSpeed needs a number: it hands them on, and an optimizer step fails much later."""
    clipping = ds_config.get("gradient_clipping")
    if clipping is not None and not (_is_number(clipping) and clipping >= 0):
        raise ConfigError("gradient_clipping", clipping, "must be a number of at least 0", _auto_hint(clipping))
    for parent in ("optimizer.params", "scheduler.params"):
        for name, value in _object(ds_config, parent).items():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, str) and (item == "auto" or _as_number(item) is not None):
                    raise ConfigError(f"{parent}.{name}", value, "must hold numbers, not strings", _auto_hint(item))


def _check_moments(ds_config: Mapping[str, Any], section: MegatronExtConfig) -> None:
    """`moment_dtype` selects our AdamW: the optimizer must be one, and no key of DeepSpeed may choose otherwise."""
    chosen = section.optimizer.moment_dtype
    if chosen is None:
        return
    key = f"megatron_ext.optimizer.moment_dtype = {chosen!r}"
    name = _lookup(ds_config, "optimizer.type")
    if name is not None and str(name).lower() not in ("adam", "adamw"):
        raise ConfigError("optimizer.type", name, f'must be "Adam" or "AdamW" beside {key}')
    params = _object(ds_config, "optimizer.params")
    for param, value in params.items():
        if param not in _ADAM_PARAMS:
            near = difflib.get_close_matches(param, _ADAM_PARAMS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"optimizer.params.{param}", value, "is not a parameter of AdamW",
                              f"the nearest is {near}")
    if _is_on(params.get("amsgrad")):
        raise ConfigError("optimizer.params.amsgrad", params["amsgrad"], f"AMSGrad is not available beside {key}")
    if (value := params.get("fp32_optimizer_states")) is not None and _is_on(value) != (chosen == "fp32"):
        raise ConfigError("optimizer.params.fp32_optimizer_states", value, f"contradicts {key}", "remove one of them")
    for half in ("bf16", "bfloat16"):
        for flag in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            if _is_on(value := _lookup(ds_config, f"{half}.{flag}")):
                raise ConfigError(f"{half}.{flag}", value, f"contradicts {key}, which keeps master weights in FP32",
                                  "remove one of them")


def _lookup(ds_config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where a part of it is missing or null."""
    node: Any = ds_config
    done: list[str] = []
    for part in key.split("."):
        if node is None:
            return None
        if not isinstance(node, Mapping):
            raise ConfigError(".".join(done), node, "must be an object")
        node = node.get(part)
        done.append(part)
    return node


def _object(ds_config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object at a dotted key, empty where there is none."""
    value = _lookup(ds_config, key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(key, value, "must be an object")
    return value or {}


def _is_on(value: Any) -> bool:
    """True for what DeepSpeed's models take as true."""
    return str(value).lower() in ("true", "1", "1.0", "yes", "y", "on", "t")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _auto_hint(value: Any) -> str | None:
    """What to write instead of a string, where that is known."""
    if value == "auto":
        return "\"auto\" is filled in by Hugging Face's Trainer; here it must be a number"
    number = _as_number(value) if isinstance(value, str) else None
    return None if number is None else f"write {number:g} without the quotes"
