"""What Megatron-Core itself makes of checkpoints: a script with a process of its own, for it sets up process groups.

    python -m tests.checkpoint.megatron_core '[{"do": "load", ..}, ..]'

Every job names a checkpoint (`<folder>/<release or iter_..>`), whose arguments make the model. GPTModel runs on a CPU
and without TransformerEngine once some things are put in their place: an attention whose values may have another size
than its queries (Megatron-Core's own leaves that to TransformerEngine), names of TransformerEngine that it compares
with, and the device. Weights of the "te" spec are asked for by its names through the map that layer specs have for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TE_NAMES = {"self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_"}
TE_DENSE = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def prepare() -> None:
    """One process that is all ranks, and a CPU in place of a device."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    warnings.filterwarnings("ignore")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    parallel_state.initialize_model_parallel()
    for name in ("TELinear", "TEColumnParallelLinear"):
        setattr(multi_latent_attention, name, type(name, (), {}))
    moe_utils.te_general_gemm = None


def attention() -> type:
    from megatron.core.transformer.module import MegatronModule

    class Attention(MegatronModule):
        """Causal attention of queries [s, b, n, d] and values [s, b, n, v] -> [s, b, n * v]."""

        def __init__(self, config: Any, softmax_scale: float, **_: Any):
            super().__init__(config)
            self.scale = softmax_scale

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            scores = torch.einsum("sbnd,tbnd->bnst", q, k) * self.scale
            later = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -math.inf).float().softmax(-1).to(v.dtype)
            return torch.einsum("bnst,tbnv->sbnv", weights, v).flatten(2)

    return Attention


def model_of(args: Any, names: str) -> Any:
    """GPTModel of the arguments of a checkpoint; `names` is the spec whose names it asks for."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    said = vars(args)
    values = {field.name: said[field.name] for field in dataclasses.fields(MLATransformerConfig)
              if field.name in said}
    # As Megatron's training does it (core_transformer_config_from_args), and what a CPU needs.
    values |= {"num_moe_experts": args.num_experts, "layernorm_epsilon": args.norm_epsilon,
               "gated_linear_unit": args.swiglu, "activation_func": torch.nn.functional.silu,
               "use_cpu_initialization": True, "moe_grouped_gemm": False, "transformer_impl": "local",
               "gradient_accumulation_fusion": False, "moe_token_dispatcher_type": "allgather",
               "moe_router_dtype": "fp32", "moe_aux_loss_coeff": 0.0}
    for size in ("tensor", "pipeline", "expert"):
        values.pop(f"{size}_model_parallel_size", None)
    values.pop("expert_tensor_parallel_size", None)
    config = MLATransformerConfig(**values)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer, moe in zip(spec.layer_specs, args.moe_layer_freq, strict=True):
        layer.submodules.self_attention.submodules.core_attention = attention()
        if names == "te":
            layer.submodules.sharded_state_dict_keys_map = TE_NAMES | ({} if moe else TE_DENSE)
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if args.mtp_num_layers else None
    torch.manual_seed(0)
    model = GPTModel(config, spec, vocab_size=args.padded_vocab_size,
                     max_sequence_length=args.max_position_embeddings, position_embedding_type="rope",
                     share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                     rotary_base=args.rotary_base, mtp_block_spec=mtp)
    return model.eval()


def logits_of(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """tokens [B, T] -> "logits" [B, T, V], and "mtp.<k>" of the layers that predict further tokens."""
    found: list[torch.Tensor] = []
    hook = model.output_layer.register_forward_hook(lambda _, __, out: found.append(out[0].transpose(0, 1).clone()))
    with torch.no_grad():
        model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None, labels=tokens)
    hook.remove()
    names = [*(f"mtp.{k}" for k in range(len(found) - 1)), "logits"]
    return {name: logits.contiguous() for name, logits in zip(names, found, strict=True)}


def moments_of(model: Any, sharded: dict[str, Any]) -> dict[str, Any]:
    """The state of an AdamW for all weights as Megatron-Core's FP32 optimizer saves it: twice and four times them."""
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        optim_state_to_sharding_state,
    )

    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        optimizer.state[weight] = {"exp_avg": weight.detach() * 2, "exp_avg_sq": weight.detach() * 4}
    state = optimizer.state_dict()
    optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map(sharded, iter(weights)))
    return state


def do(job: dict[str, Any]) -> None:
    """Loads a checkpoint strictly, says what it computes, and saves it as it would itself.

    Keys of a job: `checkpoint`; `names`: of a spec; `tokens`: a safetensors file with [B, T]; `logits`: a file to be
    written; `save`: a folder to be made with the same checkpoint by Megatron-Core's own hand; `metadata` and `stack`:
    for the names that it is saved by; `moments`: whether with an optimizer's.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    folder = Path(job["checkpoint"])
    legacy = folder / "mp_rank_00" / "model_optim_rng.pt"
    if legacy.exists():
        state = torch.load(legacy)  # weights only, as Megatron-Core loads it
        model = model_of(state["args"], job["names"])
        model.load_state_dict(state["model"], strict=True)
    else:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        model = model_of(common["args"], job["names"])
        metadata = ensure_metadata_has_dp_cp_group(dist_checkpointing.load_content_metadata(str(folder)))
        asked = {"model": model.sharded_state_dict(metadata=metadata)}
        loaded, missing, unexpected = dist_checkpointing.load(asked, str(folder), strict=StrictHandling.RETURN_ALL)
        assert not unexpected, unexpected  # what the model has and the checkpoint has not
        assert all("_extra_state" in key for key in missing), missing  # what is there and nobody asked for
        state = loaded
        model.load_state_dict(state["model"], strict=True)
    if "logits" in job:
        save_file(logits_of(model, load_file(job["tokens"])["tokens"]), job["logits"])
    if "save" in job:
        target = Path(job["save"]) / "iter_0000007"
        target.mkdir(parents=True)
        metadata = dict(job.get("metadata", {}))
        if job.get("stack"):  # as if all layers had been said to be of one kind
            model.decoder.config.moe_layer_freq = 1
        tree = {"model": model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(dict(metadata)))}
        if job.get("moments"):
            tree["optimizer"] = moments_of(model, tree["model"])
        tree |= {"args": state["args"], "checkpoint_version": 3.0, "iteration": 7}
        dist_checkpointing.save(tree, str(target), content_metadata=metadata)
        (target.parent / "latest_checkpointed_iteration.txt").write_text("7")


if __name__ == "__main__":
    prepare()
    for each in json.loads(sys.argv[1]):
        do(each)
    torch.distributed.destroy_process_group()
