"""The settings of a DeepSeek-V2 or V3 model, read from and written to Hugging Face's `config.json`.

Names are Hugging Face's. The two families differ in the router only: V3 scores with sigmoid and chooses with a
correction bias (`noaux_tc`), V2 scores with softmax and chooses greedily, in the best groups or anywhere.
"""

from __future__ import annotations

import json
import logging
import types
import typing
from collections.abc import Container, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.rope import YarnScaling
from megatron_ext.layers.router import check_routing

logger = logging.getLogger(__name__)

_SCORING = {"deepseek_v3": "sigmoid", "deepseek_v2": "softmax"}
# What a key that is not in the file means: the defaults of Hugging Face's configuration classes. Sizes have none.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "max_position_embeddings": 4096},
    "deepseek_v2": {
        "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 2, "first_k_dense_replace": 0, "max_position_embeddings": 2048},
}
# Values that Hugging Face's classes allow and we do not build.
_ONLY = {"hidden_act": "silu", "mlp_bias": False}
# Keys passed over in silence: read above, or of the library, the tokenizer, generation, the precision on disk.
_SILENT = {
    *_ONLY, "model_type", "num_key_value_heads", "num_nextn_predict_layers", "num_mtp_layers", "rope_parameters",
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "_attn_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_router_logits",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder",
    "id2label", "label2id", "problem_type", "pretraining_tp", "ep_size", "head_dim", "qk_head_dim",
    "quantization_config",
}


@dataclass(frozen=True, kw_only=True)
class DeepSeekV3Config:
    """A DeepSeek-V3 model, or V2 with `scoring_func="softmax"` and another `topk_method`. Immutable and checked.

    Attributes that Hugging Face does not have or reads otherwise:
        hidden_dropout: dropout of each branch before it joins the residual stream; 0 in DeepSeek's models.
        moe_layer_freq: from `first_k_dense_replace` on, blocks whose index it divides have experts (DeepSeek's code;
            Hugging Face's has experts in all of them).
        norm_topk_prob: weights of the chosen experts sum to 1 before scaling. With softmax scores DeepSeek's code then
            leaves the scaling out, and Hugging Face's ignores the setting.
        rope_scaling: `YarnScaling`, a dict of its fields, or None.

    Raises:
        ConfigError: for a value that cannot work.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        scaling: Any = self.rope_scaling
        if isinstance(scaling, Mapping):
            object.__setattr__(self, "rope_scaling", _yarn(scaling, self.max_position_embeddings))
        _check_types(self)
        if self.rope_scaling is not None:
            _check_yarn(self.rope_scaling)
        _check_sizes(self)
        check_routing(self)
        _check_families(self)

    @property
    def model_type(self) -> str:
        """`deepseek_v3` or `deepseek_v2`, by the scoring function."""
        return "deepseek_v3" if self.scoring_func == "sigmoid" else "deepseek_v2"

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> DeepSeekV3Config:
        """Reads Hugging Face's configuration.

        Keys that do not concern the model are passed over; those we ignore although they might are logged in one line.

        Args:
            source: a `config.json`, the folder it lies in, or its content.

        Raises:
            ConfigError: for a file that cannot be read, another kind of model, a missing size, a value we do not build.
        """
        values = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        model_type = values.get("model_type")
        if not isinstance(model_type, str) or model_type not in _DEFAULTS:
            raise ConfigError("model_type", model_type, f"must be one of {', '.join(_DEFAULTS)}")
        for key, only in _ONLY.items():
            if values.get(key, only) != only:
                raise ConfigError(key, values[key], f"only {only!r} is built")
        if values.get("num_key_value_heads") not in (None, values.get("num_attention_heads")):
            raise ConfigError("num_key_value_heads", values["num_key_value_heads"],
                              "must equal num_attention_heads: latent attention has no grouped heads")
        known = {field.name: field.default is MISSING for field in fields(cls)}
        for name, required in known.items():
            if (required and values.get(name) is None) or (name == "q_lora_rank" and name not in values):
                raise ConfigError(name, None, "is missing")
        settings = _DEFAULTS[model_type] | {"scoring_func": _SCORING[model_type]}
        settings |= {name: values[name] for name in known if values.get(name) is not None}
        config = cls(**settings | _rope(values))
        if config.model_type != model_type:
            raise ConfigError("scoring_func", config.scoring_func, f"a {model_type} has {_SCORING[model_type]!r}")
        _log_ignored(values, known)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` for Hugging Face's and DeepSeek's own code. The inverse of `from_hf`."""
        values = asdict(self)
        if self.rope_scaling is not None:
            given = {name: value for name, value in values["rope_scaling"].items() if value is not None}
            values["rope_scaling"] = {"type": "yarn", "rope_type": "yarn"} | given
        if not self.hidden_dropout:
            del values["hidden_dropout"]
        family = self.model_type
        return {"architectures": [f"Deepseek{family[-2:].upper()}ForCausalLM"], "model_type": family} | values | {
            "hidden_act": "silu", "num_key_value_heads": self.num_attention_heads, "num_nextn_predict_layers": 0}


def _read_json(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config.json", str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError("config.json", str(path), f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("config.json", str(path), "must hold one JSON object")
    return values


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding in either spelling: `rope_scaling` and `rope_theta`, or `rope_parameters`."""
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    given = values.get(key) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(key, given, "must be an object")
    given = dict(given)
    theta, partial = given.pop("rope_theta", values.get("rope_theta")), given.pop("partial_rotary_factor", 1.0)
    if partial not in (None, 1.0):
        raise ConfigError(f"{key}.partial_rotary_factor", partial, "only 1.0 is built")
    settings = {} if theta is None else {"rope_theta": theta}
    if given.get("rope_type", given.get("type", "default")) != "default":
        return settings | {"rope_scaling": given}
    if stray := sorted(set(given) - {"rope_type", "type"}):
        raise ConfigError(f"{key}.{stray[0]}", given[stray[0]], "has no meaning unless rope_type is 'yarn'")
    return settings | {"rope_scaling": None}


def _yarn(given: Mapping[str, Any], max_position_embeddings: int) -> YarnScaling:
    kind = given.get("rope_type", given.get("type"))
    if kind != "yarn":
        raise ConfigError("rope_scaling.rope_type", kind, "must be 'default' or 'yarn'")
    # Where the original length is not given Hugging Face takes the present one. DeepSeek's files always give it.
    settings: dict[str, Any] = {"original_max_position_embeddings": max_position_embeddings}
    settings |= {name: given[name] for name in given if given[name] is not None and name not in ("rope_type", "type")}
    names = [field.name for field in fields(YarnScaling)]
    if unknown := sorted(set(settings) - set(names)):
        raise ConfigError(f"rope_scaling.{unknown[0]}", settings[unknown[0]], f"must be one of {', '.join(names)}")
    if "factor" not in settings:
        raise ConfigError("rope_scaling.factor", None, "is missing")
    return YarnScaling(**settings)


def _log_ignored(values: Mapping[str, Any], known: Container[str]) -> None:
    ignored = sorted(key for key in values if key not in known and key not in _SILENT)
    if ignored:
        logger.warning("config.json: ignored %s", ", ".join(f"{key} = {values[key]!r}" for key in ignored))
    mtp = values.get("num_nextn_predict_layers", values.get("num_mtp_layers"))
    if mtp:
        logger.warning("config.json: num_nextn_predict_layers = %s: multi-token prediction layers are not built", mtp)
    if values.get("model_type") == "deepseek_v2" and values.get("norm_topk_prob"):
        logger.warning("config.json: norm_topk_prob = true with softmax scores: weights are normalised and not scaled, "
                       "as in DeepSeek's code; Hugging Face's ignores the setting")


def _check_types(settings: Any, prefix: str = "") -> None:
    """Checks every field of a frozen dataclass against its annotation; an int given for a float becomes one."""
    hints = typing.get_type_hints(type(settings))
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if float in allowed and type(value) is int:
            object.__setattr__(settings, field.name, float(value))
        elif not any(type(value) is kind for kind in allowed):
            names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
            raise ConfigError(prefix + field.name, value, f"must be {names}")


def _check_yarn(yarn: YarnScaling) -> None:
    _check_types(yarn, "rope_scaling.")
    if yarn.factor < 1:
        raise ConfigError("rope_scaling.factor", yarn.factor, "must be at least 1")
    if yarn.original_max_position_embeddings < 1:
        raise ConfigError("rope_scaling.original_max_position_embeddings", yarn.original_max_position_embeddings,
                          "must be positive")
    if not yarn.beta_fast >= yarn.beta_slow > 0:
        raise ConfigError("rope_scaling.beta_fast", yarn.beta_fast,
                          f"must be at least beta_slow = {yarn.beta_slow}, and both above 0")


def _check_sizes(config: DeepSeekV3Config) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim",
                 "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group", "moe_layer_freq", "rms_norm_eps",
                 "max_position_embeddings", "routed_scaling_factor"):
        if not getattr(config, name) > 0:
            raise ConfigError(name, getattr(config, name), "must be positive")
    if config.q_lora_rank is not None and config.q_lora_rank <= 0:
        raise ConfigError("q_lora_rank", config.q_lora_rank, "must be positive, or null for one full projection")
    for name in ("n_shared_experts", "first_k_dense_replace", "initializer_range"):
        if getattr(config, name) < 0:
            raise ConfigError(name, getattr(config, name), "must not be negative")
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(name, getattr(config, name), "must be at least 0 and below 1")
    if config.qk_rope_head_dim % 2:
        raise ConfigError("qk_rope_head_dim", config.qk_rope_head_dim, "must be even: rotation acts on pairs")
    if not config.rope_theta > 1:
        raise ConfigError("rope_theta", config.rope_theta, "must exceed 1")


def _check_families(config: DeepSeekV3Config) -> None:
    """The layers mix scores and choices at will; a model is V3 or V2."""
    allowed = {"sigmoid": ("noaux_tc",), "softmax": ("greedy", "group_limited_greedy")}[config.scoring_func]
    if config.topk_method not in allowed:
        raise ConfigError("topk_method", config.topk_method,
                          f"must be one of {', '.join(allowed)} when scoring_func is {config.scoring_func!r}")
