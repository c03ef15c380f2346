"""The official FP8 release of DeepSeek-V3 as its headers alone: 163 shards in their full length, sparse on disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "moe_layer_freq": 1, "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}}
H, SHARDS = 7168, 163
SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
Listing = dict[str, tuple[str, list[int]]]


def listing() -> Listing:
    """Name -> dtype and shape of every tensor, as counted from the model's description and not from our table."""
    found: Listing = {"model.embed_tokens.weight": ("BF16", [129280, H])}

    def fp8(name: str, rows: int, columns: int) -> None:
        found[name + ".weight"] = "F8_E4M3", [rows, columns]
        found[name + ".weight_scale_inv"] = "F32", [-(-rows // 128), -(-columns // 128)]

    def mlp(name: str, size: int) -> None:
        for projection in ("gate_proj", "up_proj"):
            fp8(f"{name}.{projection}", size, H)
        fp8(f"{name}.down_proj", H, size)

    for i in range(62):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = "BF16", [H]
        fp8(f"{layer}.self_attn.q_a_proj", 1536, H)
        fp8(f"{layer}.self_attn.q_b_proj", 24576, 1536)
        fp8(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, H)
        fp8(f"{layer}.self_attn.kv_b_proj", 32768, 512)
        fp8(f"{layer}.self_attn.o_proj", H, 16384)
        found[f"{layer}.self_attn.q_a_layernorm.weight"] = "BF16", [1536]
        found[f"{layer}.self_attn.kv_a_layernorm.weight"] = "BF16", [512]
        if i < 3:
            mlp(f"{layer}.mlp", 18432)
            continue
        found[f"{layer}.mlp.gate.weight"] = "BF16", [256, H]
        found[f"{layer}.mlp.gate.e_score_correction_bias"] = "F32", [256]
        for expert in ["shared_experts", *(f"experts.{e}" for e in range(256))]:
            mlp(f"{layer}.mlp.{expert}", 2048)
    mtp = "model.layers.61"
    found |= {f"{mtp}.{name}.weight": ("BF16", [H]) for name in ("enorm", "hnorm", "shared_head.norm")}
    found[f"{mtp}.eh_proj.weight"] = "BF16", [H, 2 * H]
    found |= {f"{mtp}.{name}.weight": ("BF16", [129280, H]) for name in ("embed_tokens", "shared_head.head")}
    found |= {"model.norm.weight": ("BF16", [H]), "lm_head.weight": ("BF16", [129280, H])}
    return found


def nbytes(dtype: str, shape: list[int]) -> int:
    count = SIZES[dtype]
    for size in shape:
        count *= size
    return count


def write(folder: Path) -> tuple[int, int]:
    """Writes the folder.

    Returns:
        Tensors, and bytes of tensors.
    """
    folder.mkdir(parents=True)
    tensors = listing()
    total = sum(nbytes(*entry) for entry in tensors.values())
    placed: dict[str, str] = {}
    shards: list[Listing] = [{} for _ in range(SHARDS)]
    done = 0
    for name, entry in tensors.items():
        shards[done * SHARDS // total][name] = entry
        done += nbytes(*entry)
    for number, shard in enumerate(shards, start=1):
        file, header, end = f"model-{number:05d}-of-{SHARDS:06d}.safetensors", {}, 0
        for name, (dtype, shape) in shard.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes(dtype, shape)]}
            end += nbytes(dtype, shape)
            placed[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return len(tensors), total
