"""Tiny random checkpoints in Hugging Face's layout, written with the safetensors library and not with our writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint.convert import Options, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.verify import verify
from megatron_ext.fp8 import quantize

Tensors = dict[str, torch.Tensor]
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}


def config(family: str = "v3", *, q_lora: bool = True, mtp: int = 0, tied: bool = False, dense: int = 1,
           layers: int = 2, wide: bool = False, **changes: Any) -> dict[str, Any]:
    """The content of a config.json. `wide` has more than one FP8 block in most matrices, some of them partial."""
    values: dict[str, Any] = {
        "architectures": [f"Deepseek{family.upper()}ForCausalLM"], "model_type": f"deepseek_{family}",
        "vocab_size": 48, "hidden_size": 256 if wide else 32, "intermediate_size": 512 if wide else 24,
        "moe_intermediate_size": 256 if wide else 12, "num_hidden_layers": layers,
        "num_attention_heads": 8 if wide else 4,
        "num_key_value_heads": 8 if wide else 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 2 if wide else 1,
        "kv_lora_rank": 512 if wide else 16, "q_lora_rank": (200 if wide else 20) if q_lora else None,
        "qk_nope_head_dim": 64 if wide else 8, "qk_rope_head_dim": 64 if wide else 4, "v_head_dim": 64 if wide else 8,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": dense, "tie_word_embeddings": tied,
        "max_position_embeddings": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "num_nextn_predict_layers": mtp}
    if family == "v3":
        values |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    else:
        values |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1,
                   "aux_loss_alpha": 0.001}
    return values | changes


def tensors_of(values: dict[str, Any], dtype: str = "bf16", seed: int = 0) -> Tensors:
    """Random tensors of a config, FP8 ones with their scales, as in the releases."""
    torch.manual_seed(seed)
    found: Tensors = {}
    for name, tensor in Model.from_hf(values).table.items():
        row = tensor.row
        if row.optional or (row.alias and name == "lm_head.weight"):
            continue
        if row.alias:
            found[name] = found[row.alias].clone() if row.alias in found else found.get(row.alias, torch.empty(0))
            continue
        number = torch.randn(tensor.shape) * (1.0 if "norm" in name else 0.3)
        if row.fp32:
            found[name] = number
        elif dtype == "fp8" and row.quantised:
            quantised = quantize(number, (128, 128))
            found[name], found[name + "_scale_inv"] = quantised.data, quantised.scale
        else:
            found[name] = number.to(DTYPES[dtype])
    head = "lm_head.weight" if not values["tie_word_embeddings"] else "model.embed_tokens.weight"
    for name in found:
        if name.endswith("shared_head.head.weight"):
            found[name] = found[head].clone()
    return found


def save(folder: Path, values: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """Writes a folder; with several shards a weight and its scales lie apart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    placed = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make(folder: Path, dtype: str = "bf16", shards: int = 1, seed: int = 0, **settings: Any) -> Path:
    """A folder of a random model; see `config` for the settings."""
    values = config(**settings)
    if dtype == "fp8":
        values["quantization_config"] = FP8
    if dtype == "fp32":
        values["torch_dtype"] = "float32"
    return save(folder, values, tensors_of(values, dtype, seed), shards)


def load(folder: Path) -> Tensors:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(a: Tensors, b: Tensors) -> bool:
    """Whether names, dtypes, shapes and bits are the same."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        and torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)) for name in a)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(source: Path, destination: Path, to: str, dtype: str | None = None, workers: int = 1,
            **options: Any) -> Path:
    """Converts and verifies."""
    plan = make_plan(open_checkpoint(source), named(to), Options(**options), dtype)
    run(plan, destination, workers)
    verify(plan, destination)
    return destination
