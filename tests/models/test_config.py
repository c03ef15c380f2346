"""Hugging Face's configuration files, read and written; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.rope import YarnScaling
from megatron_ext.models import DeepSeekV3Config

# As published with DeepSeek-V3, DeepSeek-V2 and DeepSeek-V2-Lite.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280}
V2 = V3 | {
    "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 8,
    "topk_group": 3, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False,
    "routed_scaling_factor": 16.0, "first_k_dense_replace": 1, "num_hidden_layers": 60, "hidden_size": 5120,
    "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.001, "seq_aux": True}
V2_LITE = V2 | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
                "routed_scaling_factor": 1.0}


def without(source: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in source.items() if name not in names}


def test_v3() -> None:
    config = DeepSeekV3Config.from_hf(V3)
    assert config.model_type == "deepseek_v3"
    assert config.rope_scaling == YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    assert type(config.rope_theta) is float
    assert (config.n_group, config.topk_group, config.q_lora_rank) == (8, 4, 1536)


def test_v2_and_lite() -> None:
    config, lite = DeepSeekV3Config.from_hf(V2), DeepSeekV3Config.from_hf(V2_LITE)
    assert config.model_type == lite.model_type == "deepseek_v2"
    assert (config.topk_method, config.topk_group, config.routed_scaling_factor) == ("group_limited_greedy", 3, 16.0)
    assert (lite.topk_method, lite.q_lora_rank, lite.n_group) == ("greedy", None, 1)


@pytest.mark.parametrize("source", [V3, V2, V2_LITE])
def test_round_trip_and_files(tmp_path: Path, source: dict[str, Any]) -> None:
    config = DeepSeekV3Config.from_hf(source)
    assert DeepSeekV3Config.from_hf(config.to_hf()) == config
    assert config.to_hf()["num_nextn_predict_layers"] == 0  # what we save has none
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert DeepSeekV3Config.from_hf(tmp_path) == DeepSeekV3Config.from_hf(str(tmp_path / "config.json")) == config
    dropped = replace(config, hidden_dropout=0.1)
    assert DeepSeekV3Config.from_hf(dropped.to_hf()) == dropped


def test_both_spellings_of_rope() -> None:
    old = DeepSeekV3Config.from_hf(V3 | {"rope_theta": 5000})
    scaling = without(V3["rope_scaling"], "type")
    new = without(V3, "rope_scaling", "rope_theta") | {
        "rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 5000.0}}
    assert DeepSeekV3Config.from_hf(new) == old
    plain = without(V3, "rope_scaling", "rope_theta") | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    assert DeepSeekV3Config.from_hf(plain) == replace(old, rope_scaling=None)
    assert DeepSeekV3Config.from_hf(V3 | {"rope_scaling": None, "rope_theta": 5000}) == replace(old, rope_scaling=None)


def test_original_length_defaults_to_the_present_one() -> None:
    scaling = {"type": "yarn", "factor": 2.0}
    config = DeepSeekV3Config.from_hf(V3 | {"rope_scaling": scaling, "max_position_embeddings": 777})
    assert config.rope_scaling.original_max_position_embeddings == 777


def test_missing_routing_keys_mean_what_hugging_face_takes_them_to_mean() -> None:
    names = ("topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group",
             "n_shared_experts", "first_k_dense_replace")
    v3, v2 = DeepSeekV3Config.from_hf(without(V3, *names)), DeepSeekV3Config.from_hf(without(V2, *names))
    assert [getattr(v3, name) for name in names] == ["noaux_tc", "sigmoid", True, 2.5, 8, 4, 1, 3]
    assert [getattr(v2, name) for name in names] == ["greedy", "softmax", False, 1.0, 1, 1, 2, 0]
    assert DeepSeekV3Config.from_hf(V2_LITE | {"n_group": None, "topk_group": None}).n_group == 1


def test_what_is_ignored_is_said(caplog: pytest.LogCaptureFixture) -> None:
    DeepSeekV3Config.from_hf(without(V3, "num_nextn_predict_layers"))
    assert not caplog.records
    DeepSeekV3Config.from_hf(V3)
    assert ["num_nextn_predict_layers" in record.message for record in caplog.records] == [True]
    caplog.clear()
    DeepSeekV3Config.from_hf(V2 | {"swiglu_limit": 10.0})
    (record,) = caplog.records
    assert "aux_loss_alpha = 0.001" in record.message
    assert "swiglu_limit = 10.0" in record.message
    caplog.clear()
    DeepSeekV3Config.from_hf(without(V2, "aux_loss_alpha", "seq_aux") | {"norm_topk_prob": True})
    assert ["norm_topk_prob" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(("changes", "key"), [
    ({"model_type": "llama"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"scoring_func": "softmax"}, "topk_method"),
    ({"scoring_func": "softmax", "topk_method": "greedy"}, "scoring_func"),
    ({"scoring_func": "sqrtsoftplus"}, "scoring_func"),
    ({"topk_method": "best"}, "topk_method"),
    ({"n_group": 7}, "n_group"),
    ({"topk_group": 9}, "topk_group"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
    ({"hidden_size": "7168"}, "hidden_size"),
    ({"hidden_size": 7168.0}, "hidden_size"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    ({"q_lora_rank": 0}, "q_lora_rank"),
    ({"n_shared_experts": -1}, "n_shared_experts"),
    ({"attention_dropout": 1.0}, "attention_dropout"),
    ({"rope_theta": 1}, "rope_theta"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {"type": "default", "factor": 2}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "yarn", "factor": "40"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 40, "beta": 1}}, "rope_scaling.beta"),
    ({"rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 0.5}}, "rope_scaling.beta_fast"),
    ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}},
     "rope_scaling.original_max_position_embeddings"),
    ({"rope_scaling": {"type": "yarn", "factor": 4, "partial_rotary_factor": 0.5}},
     "rope_scaling.partial_rotary_factor"),
])
def test_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DeepSeekV3Config.from_hf(V3 | changes)
    assert caught.value.key == key
    assert key in str(caught.value)


@pytest.mark.parametrize("name", ["hidden_size", "n_routed_experts", "q_lora_rank"])
def test_a_missing_size_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = None: is missing"):
        DeepSeekV3Config.from_hf(without(V3, name))


def test_a_greedy_router_is_not_bound_by_groups() -> None:
    assert DeepSeekV3Config.from_hf(V2_LITE | {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 60})


@pytest.mark.parametrize(("content", "rule"), [
    (None, "cannot be read"), ("{", "is not JSON"), ("[]", "one JSON object"), ("\xff", "is not JSON")])
def test_unreadable_files(tmp_path: Path, content: str | None, rule: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=rule):
        DeepSeekV3Config.from_hf(tmp_path)


def test_checked_however_it_is_made() -> None:
    config = DeepSeekV3Config.from_hf(V3)
    with pytest.raises(ConfigError):
        replace(config, topk_group=9)
    with pytest.raises(ConfigError):
        replace(config, rope_scaling=YarnScaling(0.5, 4096))
    assert replace(config, rope_scaling={"type": "yarn", "factor": 2}).rope_scaling.factor == 2.0
