"""The `megatron_ext` section of a ds_config: its keys, their types, their defaults, and what is said about a wrong one.

DeepSpeed ignores top-level sections that it does not know, so nobody else checks this one: an unknown key, a value of
the wrong type and a key of a later version all end in one `ConfigError`, for the first mistake in file order.
`parse_section` is the only door: it also fills the defaults that depend on other keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from megatron_ext.config.errors import ConfigError

SECTION = "megatron_ext"


class _Section(BaseModel):
    """Strict ("4" is not 4, true is not 1), closed and frozen. A field's description completes "must be ..."."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    def given(self, key: str) -> Any:
        """The value of a key that the user has written; None for a default."""
        return getattr(self, key) if key in self.model_fields_set else None


SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved_paired", "zb_h1", "zbv", "dualpipe", "dualpipev",
             "dualpipe_zb", "dualpipe_interleaved", "wave", "chimera", "auto")
"""Those of megatron_ext/pipeline/schedules, which this row must not import, and "auto"."""


class PipelineSection(_Section):
    schedule: str = Field(
        default="dualpipe", pattern="^(" + "|".join(SCHEDULES) + ")$",
        description="one of " + ", ".join(f'"{name}"' for name in SCHEDULES))
    stages: int | None = Field(
        default=None, ge=1, description="an integer of at least 1, or null (the module's own num_stages)")
    chunks: int = Field(default=1, ge=1, description="an integer of at least 1 (stages of one direction on each rank)")
    placement: Literal["bidirectional", "ring", "wave"] | None = Field(
        default=None, description='"bidirectional", "ring", "wave" or null (that of the schedule; for "auto", '
        'bidirectional)')
    memory_limit: float | None = Field(
        default=None, gt=0, allow_inf_nan=False,
        description="a number above 0 (activations a rank may hold, each its share of the model for one micro-batch), "
        "or null")
    overlap: bool = Field(default=True, description="true or false")
    trace: str | None = Field(default=None, min_length=1, description="a folder, or null")


class ExpertParallelSection(_Section):
    size: int = Field(default=1, ge=1, description="an integer of at least 1")
    dispatch_dtype: Literal["model", "bf16", "fp8"] | None = Field(
        default=None, description='"model", "bf16", "fp8" or null ("fp8" where FP8 is enabled, else "model")')
    combine_dtype: Literal["model", "bf16"] = Field(default="model", description='"model" or "bf16"')
    dispatch_chunks: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description='an integer of at least 1 (parts of a rank\'s experts, whose tokens are sent apart) or "auto"')
    transport: Literal["torch", "deep_ep"] = Field(default="torch", description='"torch" or "deep_ep"')
    two_hop: bool | Literal["auto"] = Field(default="auto", description='true, false or "auto"')
    ranks_per_node: int | None = Field(
        default=None, ge=1, description="an integer of at least 1, or null (what the launcher says)")


class Fp8Section(_Section):
    enabled: bool = Field(default=False, description="true or false")
    activation_cache: bool = Field(default=True, description="true or false")


class KernelsSection(_Section):
    backend: Literal["auto", "cuda", "deep_gemm", "torch", "triton", "cpu", "reference"] = Field(
        default="auto", description='"auto", "cuda", "deep_gemm", "torch", "triton", "cpu" or "reference"')


class RouterSection(_Section):
    balancing: Literal["aux_loss_free", "none"] = Field(
        default="aux_loss_free", description='"aux_loss_free" or "none"')
    bias_update_speed: float = Field(
        default=0.001, ge=0, allow_inf_nan=False, description="a number of at least 0 (0 freezes the bias)")


class OptimizerSection(_Section):
    moment_dtype: Literal["bf16", "fp32"] | None = Field(
        default=None, description='"bf16", "fp32" or null (the optimizer that DeepSpeed makes)')


_From: Any = create_model("_From", __base__=_Section, **{"from": (str | None, Field(  # type: ignore[call-overload]
    default=None, min_length=1, description="the folder of a checkpoint, or null (weights are drawn)"))})
"""The one key that Python's syntax has another use for."""


class LoadSection(_From):
    format: Literal["hf", "deepseek", "deepspeed", "megatron", "megatron-legacy", "dcp"] | None = Field(
        default=None, description='"hf", "deepseek", "deepspeed", "megatron", "megatron-legacy", "dcp" or null (found '
        'out)')
    config: str | None = Field(
        default=None, min_length=1,
        description="a Hugging Face config.json, the folder of one, or null (the checkpoint's own)")
    optimizer: bool = Field(default=True, description="true or false")
    follow_links: bool = Field(default=False, description="true or false")

    @property
    def path(self) -> str | None:
        """The key `from`."""
        return getattr(self, "from")


class MegatronExtConfig(_Section):
    """The whole section. Made by `parse_section`, after which `expert_parallel.dispatch_dtype` is never None."""

    pipeline: PipelineSection = Field(default=PipelineSection(), description="an object")
    expert_parallel: ExpertParallelSection = Field(default=ExpertParallelSection(), description="an object")
    fp8: Fp8Section = Field(default=Fp8Section(), description="an object")
    kernels: KernelsSection = Field(default=KernelsSection(), description="an object")
    router: RouterSection = Field(default=RouterSection(), description="an object")
    optimizer: OptimizerSection = Field(default=OptimizerSection(), description="an object")
    recompute: tuple[Literal["attention", "mlp", "rms_norm", "swiglu"], ...] = Field(
        default=(), strict=False, description='a list of "attention", "mlp", "rms_norm" and "swiglu"')
    load: LoadSection = Field(default=LoadSection(), description="an object")

    def resolved(self) -> dict[str, Any]:
        """Every key with the value in force, as JSON would hold it: for records of a run and for checkpoints."""
        return self.model_dump(mode="json")


# What the design has and this version has not, so that the message can say so.
_LATER_KEYS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    (): ("ema",),
    ("router",): ("sequence_loss",),
}
_LATER_VALUES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("recompute",): ("mla_up_projection",),
}


def parse_section(ds_config: Mapping[str, Any]) -> MegatronExtConfig:
    """Reads `ds_config["megatron_ext"]`; all defaults where there is none.

    Raises:
        ConfigError: for the first key, in file order, that is unknown, of a later version or has a wrong value.
    """
    for key in ds_config:  # a section under another name would be ignored as a whole, by DeepSpeed and by us
        name = str(key).strip().lower().replace("-", "_")
        if key != SECTION and difflib.SequenceMatcher(None, name, SECTION).ratio() > 0.85:
            raise ConfigError(str(key), ds_config[key], "is no section", f"did you mean {SECTION}?")
    document = ds_config.get(SECTION, {})
    try:
        config = MegatronExtConfig.model_validate(document)
    except ValidationError as error:
        raise _first_error(document, error) from None
    if config.expert_parallel.dispatch_dtype is None:
        dispatch_dtype = "fp8" if config.fp8.enabled else "model"
        experts = config.expert_parallel.model_copy(update={"dispatch_dtype": dispatch_dtype})
        config = config.model_copy(update={"expert_parallel": experts})
    return config


def _first_error(document: Any, error: ValidationError) -> ConfigError:
    """The mistake that a reader of the file meets first (pydantic reports unknown keys last)."""

    def real(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Without the names that pydantic adds for the types a value might have had."""
        node, found = document, []
        for key in path:
            if isinstance(node, Mapping):
                [node] = [value for name, value in node.items() if str(name) == str(key)]
            elif isinstance(node, (list, tuple)) and isinstance(key, int):
                node = node[key]
            else:
                break
            found.append(key)
        return tuple(found)

    def place(path: tuple[str | int, ...]) -> tuple[int, ...]:
        places, node = [], document
        for key in real(path):
            names = [str(k) for k in node] if isinstance(node, Mapping) else [str(i) for i in range(len(node))]
            places.append(names.index(str(key)))
            node = list(node.values() if isinstance(node, Mapping) else node)[places[-1]]
        return tuple(places)

    details = min(error.errors(), key=lambda details: place(details["loc"]))
    path = tuple(str(key) for key in real(details["loc"]))
    name = ".".join((SECTION, *path))
    value = document
    for key in real(details["loc"]):
        value = value[key] if not isinstance(value, Mapping) else {str(k): v for k, v in value.items()}[str(key)]
    if details["type"] == "extra_forbidden":
        return _unknown_key(path, name, value)
    if details["type"] == "invalid_key":
        return ConfigError(name, details["input"], "every key must be a string")
    return _wrong_value(path, name, value)


def _wrong_value(path: tuple[str, ...], name: str, value: Any) -> ConfigError:
    section: Any = MegatronExtConfig
    description, known = "an object", 0
    for key in path:
        fields = getattr(section, "model_fields", {})
        if key not in fields:  # an element of a list: `description` is of the whole
            break
        section, description, known = fields[key].annotation, fields[key].description, known + 1
    hint = None
    if isinstance(value, str):
        if value in _LATER_VALUES.get(path[:known], ()):
            return ConfigError(name, value, "is not available yet", f"it must be {description} in this version")
        near = difflib.get_close_matches(value, description.split('"')[1::2], n=1)
        hint = f'did you mean "{near[0]}"?' if near else None
    return ConfigError(name, value, f"must be {description}", hint)


def _unknown_key(path: tuple[str, ...], name: str, value: Any) -> ConfigError:
    *parents, key = path
    level = tuple(parents)
    if key in _LATER_KEYS.get(level, ()):
        return ConfigError(name, value, "is not available yet in this version", "remove the key")
    levels = [(), *((part,) for part in MegatronExtConfig.model_fields)]
    candidates = [(*other, field) for other in levels for field in (*_fields(other), *_LATER_KEYS.get(other, ()))]
    nearest = max(candidates, key=lambda candidate: (_likeness(key, candidate[-1]), candidate[:-1] == level))
    later = " (not available yet)" if nearest[-1] in _LATER_KEYS.get(nearest[:-1], ()) else ""
    return ConfigError(name, value, f"is not a key here, where there are {', '.join(_fields(level))}",
                       f"the nearest name is {'.'.join((SECTION, *nearest))}{later}")


def _likeness(given: str, name: str) -> float:
    return difflib.SequenceMatcher(None, given.lower(), name).ratio()


def _fields(level: tuple[str, ...]) -> list[str]:
    """The keys of the section itself, level (), or of one of its parts, level ("pipeline",)."""
    section: Any = MegatronExtConfig
    for key in level:
        section = section.model_fields[key].annotation
    return list(getattr(section, "model_fields", ()))
