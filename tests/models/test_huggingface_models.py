"""Logits and gradients equal Hugging Face's `DeepseekV3ForCausalLM` and `DeepseekV2ForCausalLM`, from saved folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.models import DeepSeekV3, DeepSeekV3Config, cross_entropy
from megatron_ext.models.huggingface import list_tensors

transformers = pytest.importorskip("transformers")

LOGITS, GRADIENTS = 2e-5, 1e-4
# mscale differs from mscale_all_dim, and the sequences are longer than the original context.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
        "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}


def random_sizes(seed: int, q_lora: bool, yarn: bool, **family: Any) -> dict[str, Any]:
    """A tiny configuration with sizes drawn from `seed`, weights large enough for attention and routing to be sharp."""
    draw = random.Random(seed)
    heads = draw.choice([2, 3])
    return {
        "vocab_size": draw.randint(50, 90), "hidden_size": heads * draw.choice([8, 16]), "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": draw.randint(20, 50),
        "moe_intermediate_size": draw.randint(9, 30), "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "n_routed_experts": 8, "num_experts_per_tok": draw.choice([2, 3]), "n_shared_experts": draw.choice([1, 2]),
        "kv_lora_rank": draw.choice([8, 14, 20]), "q_lora_rank": draw.randint(8, 20) if q_lora else None,
        "qk_nope_head_dim": draw.choice([6, 8]), "qk_rope_head_dim": draw.choice([4, 8]),
        "v_head_dim": draw.choice([5, 8]), "rms_norm_eps": 1e-3, "max_position_embeddings": 64,
        "rope_parameters": ({"rope_theta": 100.0} | YARN) if yarn else {"rope_theta": 100.0, "rope_type": "default"},
        "attention_bias": draw.choice([True, False]), "initializer_range": 0.2} | family


def hugging_face(family: str, settings: dict[str, Any]) -> torch.nn.Module:
    """Hugging Face's model, every parameter random; V3's bias is nonzero and decides some of the routing."""
    torch.manual_seed(0)
    config = getattr(transformers, f"Deepseek{family}Config")(**settings)
    model = getattr(transformers, f"Deepseek{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    return model


def gradients_on_disk(model: DeepSeekV3 | torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under one set of names, whichever way experts are fused in memory."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            prefix, gradient = name.removesuffix("gate_up_proj"), parameter.grad
            found[prefix + "gate_proj"], found[prefix + "up_proj"] = gradient.chunk(2, dim=1)
        else:
            found[name] = parameter.grad
    return found


def assert_same_model(theirs: torch.nn.Module, ours: DeepSeekV3) -> None:
    theirs.config._experts_implementation = "eager"  # their grouped one wants sizes aligned to 16 bytes
    tokens = torch.randint(0, ours.config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, dims=1)
    logits_theirs, logits_ours = theirs(tokens, use_cache=False).logits, ours(tokens)
    assert logits_theirs.std() > 0.3
    torch.testing.assert_close(logits_ours, logits_theirs, atol=LOGITS, rtol=0)

    cross_entropy(logits_theirs, labels).backward()
    cross_entropy(logits_ours, labels).backward()
    theirs_by_name, ours_by_name = gradients_on_disk(theirs), gradients_on_disk(ours)
    assert theirs_by_name.keys() == ours_by_name.keys()
    for name, gradient in ours_by_name.items():
        torch.testing.assert_close(gradient, theirs_by_name[name], atol=GRADIENTS, rtol=0,
                                   msg=lambda problem, name=name: f"{name}: {problem}")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("q_lora", [False, True])
@pytest.mark.parametrize("family", ["V2", "V3"])
def test_equals_hugging_face(tmp_path: Path, family: str, q_lora: bool, yarn: bool, grouped: bool) -> None:
    groups = {"n_group": 4, "topk_group": 2} if grouped else {"n_group": 1, "topk_group": 1}
    if family == "V2":
        groups["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    seed = 4 * q_lora + 2 * yarn + grouped
    theirs = hugging_face(family, random_sizes(seed, q_lora, yarn, routed_scaling_factor=1.7, **groups))
    theirs.save_pretrained(tmp_path)
    assert any(".experts.7.up_proj.weight" in name for name in list_tensors(tmp_path).entries)
    assert_same_model(theirs, DeepSeekV3.load_hf(tmp_path))


@pytest.mark.parametrize("special", [
    {"rope_interleave": False}, {"norm_topk_prob": False}, {"tie_word_embeddings": True}])
def test_equals_hugging_face_with(tmp_path: Path, special: dict[str, Any]) -> None:
    theirs = hugging_face("V3", random_sizes(11, True, True, n_group=4, topk_group=2, **special))
    theirs.save_pretrained(tmp_path)
    assert_same_model(theirs, DeepSeekV3.load_hf(tmp_path))


def test_bf16_folder_in_shards(tmp_path: Path) -> None:
    """Shards and BF16: widened to FP32 the models agree; as they are the bias keeps all its FP32 bits (trap 1)."""
    theirs = hugging_face("V3", random_sizes(12, True, False, n_group=2, topk_group=1))
    bias = {n: b.clone() for n, b in theirs.named_buffers() if n.endswith("correction_bias")}
    theirs.bfloat16()
    for name, value in bias.items():
        theirs.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = value
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    ours = DeepSeekV3.load_hf(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ours.to(torch.float16).to(torch.bfloat16)
    for name, value in bias.items():
        assert torch.equal(ours.get_buffer(name), value)
    logits = ours(torch.arange(20)[None])
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()

    widened = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_model(widened, DeepSeekV3.load_hf(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("family", ["V2", "V3"])
def test_hugging_face_reads_what_we_save(tmp_path: Path, family: str) -> None:
    router = {"V2": {"topk_method": "group_limited_greedy"}, "V3": {}}[family]
    theirs = hugging_face(family, random_sizes(13, True, True, n_group=4, topk_group=2, **router))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DeepSeekV3.load_hf(tmp_path / "theirs")
    ours.save_hf(tmp_path / "ours")
    assert DeepSeekV3Config.from_hf(tmp_path / "ours") == ours.config
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert_same_model(again, ours)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "float32"
