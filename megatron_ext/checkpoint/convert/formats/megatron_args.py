"""What surrounds the tensors in Megatron-Core's checkpoints: folders by iteration, and the arguments of the training.

    latest_checkpointed_iteration.txt   "1000", or "release" for weights that belong to no training
    iter_0001000/ or release/           one checkpoint

The arguments (an `argparse.Namespace`) say what Hugging Face's `config.json` says, in other words. Where there is no
config, it is made from them; what they leave open is asked for, not guessed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats.layout import CONFIG, Options, read_model
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.pickles import Record
from megatron_ext.config.errors import CheckpointError, shown

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
VERSION = 3.0
DIVISIBLE = 128
"""What the padded vocabulary is divisible by for each rank of tensor parallelism, where the arguments do not say."""
_ITERATION = re.compile(r"iter_(\d{7,})")
_HINT = "pass the Hugging Face config.json with --config"
_SIZES = {
    "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim", "v_head_dim": "v_head_dim", "n_routed_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk", "moe_intermediate_size": "moe_ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings", "rope_theta": "rotary_base", "rms_norm_eps": "norm_epsilon",
}
"""Hugging Face's name -> Megatron's, of numbers that mean the same."""
_YARN = {"factor": "rotary_scaling_factor", "original_max_position_embeddings": "original_max_position_embeddings",
         "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


# -- folders

def candidates(folder: Folder) -> dict[str, list[str]]:
    """Folders that may be checkpoints, "" for the folder itself, each with the names of what is in it."""
    found = {"": folder.names()}
    for name in found[""]:
        if (_ITERATION.fullmatch(name) or name == RELEASE) and (folder / name).is_dir():
            found[name] = Folder(folder / name, folder.follow_links).names()
    return found


def latest(folder: Folder, holds: Any) -> tuple[str, int | None]:
    """The checkpoint that is meant: its prefix ("" or a folder and "/"), and the iteration if the names say it.

    Args:
        folder: opened.
        holds: tells from the names inside whether a folder is one of the format.

    Raises:
        CheckpointError: the tracker is damaged or names what is not there; or there is none, and several checkpoints.
    """
    found = [name for name, names in candidates(folder).items() if holds(names)]
    if "" in found:
        return "", None
    if folder.has(TRACKER):
        said = folder.read(TRACKER, 1 << 10).decode(errors="replace").strip()
        iteration = int(said) if said.isascii() and said.isdigit() and len(said) < 16 else None
        if said != RELEASE and iteration is None:
            raise CheckpointError(folder / TRACKER, f"says {said[:40]!a}", f"it must be an iteration or {RELEASE!r}")
        name = RELEASE if iteration is None else f"iter_{iteration:07d}"
        if name not in found:
            raise CheckpointError(folder / name, "is no checkpoint of this format, or does not exist",
                                  f"{TRACKER} names it")
        return f"{name}/", iteration
    if len(found) != 1:
        raise CheckpointError(folder / TRACKER, "does not exist", f"there are {len(found)} checkpoints",
                              f"write into it which one is meant, or give the path of one: {', '.join(found[:3])}")
    match = _ITERATION.fullmatch(found[0])
    return f"{found[0]}/", None if match is None else int(match[1])


def home(options: Options) -> tuple[str, dict[str, bytes]]:
    """Where a checkpoint is written: its prefix, and the tracker."""
    name, said = (RELEASE, RELEASE) if options.step is None else (f"iter_{options.step:07d}", str(options.step))
    return f"{name}/", {TRACKER: said.encode()}


# -- arguments

def attributes(args: Any) -> dict[str, Any]:
    """The arguments as a dict; {} if there are none."""
    state = args.state if isinstance(args, Record) else None
    return {key: value for key, value in state.items() if isinstance(key, str)} if isinstance(state, dict) else {}


def find_model(folder: Folder, prefix: str, config: Mapping[str, Any] | None, args: Mapping[str, Any],
               where: Path) -> Model:
    """The model: of the config given, of `config.json` in the folder or beside the tensors, or of the arguments.

    Raises:
        CheckpointError: there is no config, and the arguments do not say all that it would.
    """
    if config is not None or folder.has(CONFIG):
        model = read_model(folder, config)
        if config is None and args:
            _check_settings(model, args, where, folder / CONFIG)
        return model
    if prefix and folder.has(prefix + CONFIG):
        return Model.from_hf(folder.read_json(prefix + CONFIG), folder / (prefix + CONFIG))
    if not args:
        raise CheckpointError(folder / CONFIG, "does not exist", f"{where.name} holds no arguments", _HINT)
    return Model.from_hf(_hf(args, where), where)


def _check_settings(model: Model, args: Mapping[str, Any], where: Path, config: Path) -> None:
    """Whether the arguments say the same as a `config.json` beside them of what no tensor's shape tells.

    Raises:
        CheckpointError: they do not, so that one of the two is of another model.
    """
    try:
        theirs = _hf(args, where)
    except CheckpointError:
        return  # they do not say all that a config says
    for key in ("num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob",
                "rope_theta", "rms_norm_eps", "scoring_func"):
        ours = getattr(model.config, key)
        if theirs.get(key) is not None and theirs[key] != ours:
            raise CheckpointError(config, f"has {key} = {shown(ours)}", f"{where.name} says {shown(theirs[key])}",
                                  "remove config.json, or say which is right with --config")


def check_vocabulary(model: Model, args: Mapping[str, Any], rows: int, where: Path, name: str) -> None:
    """Whether a padded vocabulary of `rows` can be that of a model.

    Raises:
        CheckpointError: it is too small, or there is more of it than padding explains.
    """
    vocabulary, said = model.config.vocab_size, args.get("vocab_size")
    multiple = 1
    for key, default in (("make_vocab_size_divisible_by", DIVISIBLE), ("tensor_model_parallel_size", 1)):
        value = args.get(key)
        multiple *= value if type(value) is int and 0 < value < 1 << 20 else default
    limit = multiple if args else 1 << 14
    if rows < vocabulary or rows - vocabulary >= limit or (type(said) is int and not said <= rows):
        raise CheckpointError(where, f"has {rows} rows", f"config.json has vocab_size = {vocabulary}, padded to a "
                              f"multiple of {multiple}", tensor=name)


def _hf(args: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The content of a `config.json` by Megatron's arguments."""
    def need(key: str, kinds: tuple[type, ...] = (int,)) -> Any:
        if type(args.get(key)) not in kinds:
            raise CheckpointError(where, f"has {key} = {shown(args.get(key))} among its arguments",
                                  "a model of DeepSeek's needs it", _HINT)
        return args[key]

    if args.get("multi_latent_attention") is not True:
        raise CheckpointError(where, "is not of a model with multi-latent attention", None, _HINT)
    numbers: tuple[type, ...] = (int, float)
    values = {ours: need(theirs, numbers if ours in ("rope_theta", "rms_norm_eps") else (int,))
              for ours, theirs in _SIZES.items()}
    sigmoid = need("moe_router_score_function", (str,)) == "sigmoid"
    bias, groups = args.get("moe_router_enable_expert_bias") is True, args.get("moe_router_num_groups")
    if sigmoid != bias:
        raise CheckpointError(where, "has sigmoid scores without an expert bias, or a bias without them",
                              "DeepSeek-V3 has both and DeepSeek-V2 neither", _HINT)
    shared = args.get("moe_shared_expert_intermediate_size") or 0
    width = values["moe_intermediate_size"]
    if type(shared) is not int or width <= 0 or shared % width:
        raise CheckpointError(where, f"has moe_shared_expert_intermediate_size = {shown(shared)}",
                              f"it must be a multiple of moe_ffn_hidden_size = {width}", _HINT)
    dense, every = _pattern(args.get("moe_layer_freq"), values["num_hidden_layers"], where)
    method = "noaux_tc" if bias else "greedy" if groups is None else "group_limited_greedy"
    family = "v3" if sigmoid else "v2"
    dtype = args.get("params_dtype")
    return {
        "architectures": [f"Deepseek{family.upper()}ForCausalLM"], "model_type": f"deepseek_{family}", **values,
        "num_key_value_heads": values["num_attention_heads"],
        "vocab_size": need("vocab_size"), "q_lora_rank": args.get("q_lora_rank"),
        "n_shared_experts": shared // width, "n_group": 1 if groups is None else groups,
        "topk_group": 1 if groups is None else args.get("moe_router_group_topk"), "topk_method": method,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "norm_topk_prob": sigmoid or args.get("moe_router_pre_softmax") is not True,
        "routed_scaling_factor": args.get("moe_router_topk_scaling_factor") or 1.0,
        "first_k_dense_replace": dense, "moe_layer_freq": every,
        "num_nextn_predict_layers": args.get("mtp_num_layers") or 0,
        "tie_word_embeddings": not need("untie_embeddings_and_output_weights", (bool,)),
        "rope_scaling": _yarn(args, where), "hidden_act": "silu", "attention_bias": False,
        "torch_dtype": _DTYPES.get(dtype, "bfloat16") if isinstance(dtype, str) else "bfloat16",
    }


def _yarn(args: Mapping[str, Any], where: Path) -> dict[str, Any] | None:
    """`rope_scaling`; with multi-latent attention Megatron takes yarn where nothing is said."""
    if args.get("rope_type") == "rope":
        return None
    defaults = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                "mscale_all_dim": 0.0}
    found = {ours: default if args.get(_YARN[ours]) is None else args[_YARN[ours]]
             for ours, default in defaults.items()}
    if strange := [ours for ours, value in found.items() if type(value) not in (int, float)]:
        raise CheckpointError(where, f"has a {_YARN[strange[0]]} that is no number", None, _HINT)
    return {"type": "yarn", **found}


def _pattern(said: Any, layers: int, where: Path) -> tuple[int, int]:
    """`moe_layer_freq` (every n-th layer, or a list of 0 and 1) -> `first_k_dense_replace` and every how many."""
    if type(said) is int and said > 0:
        return 0, said
    if isinstance(said, list) and len(said) == layers and all(value in (0, 1) for value in said):
        dense = said.index(1) if 1 in said else layers
        for every in range(1, layers + 1):
            if said == [int(i >= dense and i % every == 0) for i in range(layers)]:
                return dense, every
    raise CheckpointError(where, f"has moe_layer_freq = {shown(said)}",
                          "DeepSeek's models have dense layers first", _HINT)


def namespace(model: Model, options: Options, dtype: str, rows: int) -> argparse.Namespace:
    """The arguments that a checkpoint is written with: those that make the model, and its parallel layout.

    Args:
        model: of the config.
        options: parallel layout.
        dtype: of most weights.
        rows: of the padded vocabulary.
    """
    c, hf = model.config, model.hf
    said = {"rope_theta": c.rope_theta, "max_position_embeddings": c.max_position_embeddings, **hf}
    scaling = said.get("rope_scaling") or said.get("rope_parameters") or {}
    theta = scaling.get("rope_theta", said["rope_theta"])
    v3 = c.scoring_func == "sigmoid"
    values: dict[str, Any] = {theirs: getattr(c, ours) for ours, theirs in _SIZES.items()}
    values |= {
        "max_position_embeddings": said["max_position_embeddings"], "seq_length": said["max_position_embeddings"],
        "rotary_base": theta, "q_lora_rank": c.q_lora_rank,
        "multi_latent_attention": True, "qk_layernorm": True, "position_embedding_type": "rope",
        "add_position_embedding": True, "use_rotary_position_embeddings": True, "rotary_percent": 1.0,
        "rotary_interleaved": False, "normalization": "RMSNorm", "swiglu": True, "squared_relu": False,
        "add_bias_linear": False, "add_qkv_bias": False, "group_query_attention": False, "num_query_groups": None,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False, "untie_embeddings_and_output_weights": not c.tie_word_embeddings,
        "moe_layer_freq": [int(model.is_moe(i)) for i in range(c.num_hidden_layers)],
        "moe_shared_expert_intermediate_size": c.n_shared_experts * c.moe_intermediate_size or None,
        "moe_router_score_function": c.scoring_func, "moe_router_enable_expert_bias": v3,
        "moe_router_pre_softmax": not v3, "moe_router_topk_scaling_factor": c.routed_scaling_factor,
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_grouped_gemm": True,
        "mtp_num_layers": model.mtp_layers or None, "vocab_size": c.vocab_size, "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": DIVISIBLE, "params_dtype": getattr(torch, _DTYPES[dtype]),
        "bf16": dtype == "BF16", "fp16": dtype == "F16", "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp, "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": options.tp, "no_save_optim": True, "no_save_rng": True,
    }
    if c.n_group > 1 or c.topk_method != "greedy":
        values |= {"moe_router_num_groups": c.n_group, "moe_router_group_topk": c.topk_group}
    yarn = scaling.get("rope_type", scaling.get("type")) == "yarn"
    values["rope_type"] = "yarn" if yarn else "rope"
    if yarn:
        values |= {_YARN[key]: value for key, value in scaling.items() if key in _YARN and value is not None}
    return argparse.Namespace(**values)
