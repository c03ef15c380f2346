"""The same small DeepSeek-V3 trained by the engine on many ranks, and by a plain loop in one process.

The loop here shares the layers with the engine and nothing else: no pipeline, no executor, no ZeRO, torch's own AdamW
and clipping. What it computes is the definition of what every layout must reproduce.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import megatron_ext
from megatron_ext.layers.head import tied_logits
from megatron_ext.layers.phases import whole
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config, cross_entropy, deepseek_v3
from megatron_ext.pipeline.random import RandomKey
from megatron_ext.pipeline.schedules import placement_of

SEED = 77
# With an epsilon of 1e-8 Adam turns the rounding of a gradient of 1e-8 into 2e-5 of a weight, whatever the layout.
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-6, 0.1
BIAS_SPEED = 0.01


@dataclass(frozen=True)
class Case:
    """One cell of the table. `micro_batches` is m, of all directions of a pipeline together."""

    stages: int = 2
    replicas: int = 1
    expert_parallel: int = 1
    zero: int = 1
    offload: bool = False
    dropout: float = 0.0
    micro_batches: int = 4
    steps: int = 10
    clip: float = 0.1
    tied: bool = True
    bf16: bool = False
    grad_accum_dtype: str | None = None
    section: dict[str, Any] = field(default_factory=dict, hash=False)
    zero_options: dict[str, Any] = field(default_factory=dict, hash=False)
    schedule: str = "dualpipe"
    chunks: int = 1

    @property
    def per_direction(self) -> int:
        return self.micro_batches // len(placement_of(self.schedule, self.stages, self.chunks))

    @property
    def world_size(self) -> int:
        return self.stages * self.replicas

    def __str__(self) -> str:
        default = asdict(Case())
        return "-".join(f"{k}={v}" for k, v in asdict(self).items() if v != default[k]) or "default"


def model_config(case: Case) -> DeepSeekV3Config:
    # Experts 32 wide: torch's SiLU rounds the last elements of a tensor, short of two vectors, otherwise than the rest,
    # so with a width of 16 what lies there would depend on chunks.
    return DeepSeekV3Config.from_hf({
        "model_type": "deepseek_v3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
        "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": case.tied, "initializer_range": 0.1, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "attention_dropout": case.dropout, "hidden_dropout": case.dropout})


def micro_batch(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [1, 8] of micro-batch `number` of the global batch; some labels are ignored."""
    g = torch.Generator().manual_seed(1000 * step + number)
    stream = torch.randint(0, 61, (1, 9), generator=g)
    labels = stream[:, 1:].clone()
    labels[:, number % 8] = -100
    return stream[:, :-1].contiguous(), labels


def ds_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": case.per_direction,
        "gradient_clipping": case.clip, "steps_per_print": 10**6,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY}},
        "zero_optimization": {"stage": case.zero, **case.zero_options},
        "megatron_ext": {"pipeline": {"stages": case.stages, "schedule": case.schedule, "chunks": case.chunks},
                         "expert_parallel": {"size": case.expert_parallel},
                         "router": {"bias_update_speed": BIAS_SPEED}}}
    for key, value in copy.deepcopy(case.section).items():
        ours = config["megatron_ext"]
        ours[key] = {**ours.get(key, {}), **value} if isinstance(value, dict) else value
    if case.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if case.bf16:
        config["bf16"] = {"enabled": True}
    if case.grad_accum_dtype:
        config["data_types"] = {"grad_accum_dtype": case.grad_accum_dtype}
    return config


def batches(engine: Any, case: Case, first_step: int = 0) -> Any:
    """This rank's shard, endless."""
    step, n = first_step, case.per_direction
    while True:
        for k in range(n):
            yield micro_batch(step, k * engine.data_parallel_world_size + engine.data_parallel_rank)
        step += 1


def build(case: Case) -> Any:
    config = ds_config(case)
    model = megatron_ext.PipelineModule(layers=deepseek_v3(model_config(case)), loss_fn=cross_entropy, base_seed=SEED,
                                        partition_method="uniform", config=config)
    engine, *_ = megatron_ext.initialize(model=model, config=config)
    return engine


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer of the model by canonical name, experts joined; the same on every rank."""
    mine = {}
    for name, value in engine.module.state_dict().items():
        first = getattr(dict(engine.module.named_parameters()).get(name), "expert_range", (None,))[0]
        mine[name, first] = value.detach().float().cpu().clone()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    merged: dict[tuple[str, Any], torch.Tensor] = {}
    for part in found:
        for key, value in part.items():
            if key in merged:
                torch.testing.assert_close(value, merged[key], rtol=0, atol=0, msg=f"replicas of {key} differ")
            merged[key] = value
    result: dict[str, torch.Tensor] = {}
    for name, first in sorted(merged, key=lambda key: (key[0], key[1] or 0)):
        value = merged[name, first]
        result[name] = value if name not in result else torch.cat([result[name], value])
    return result


def train(case: Case) -> dict[str, Any]:
    """On every rank of a world of `case.world_size`; rank 0 returns what happened."""
    engine = build(case)
    data = batches(engine, case)
    losses, norms = [], []
    for _ in range(case.steps):
        losses.append(float(engine.train_batch(data)))
        norms.append(float(engine.get_global_grad_norm()))
    state = gather(engine)
    return {"losses": losses, "norms": norms, "state": state} if dist.get_rank() == 0 else {}


def reference(case: Case) -> dict[str, Any]:
    """The same training in one process."""
    torch.manual_seed(SEED)
    model = DeepSeekV3(model_config(case)).train()
    total = case.micro_batches * case.replicas
    layers = [model.model.embed_tokens, *model.model.layers, model.model.norm,
              (lambda x: tied_logits(model.model.embed_tokens, x)) if case.tied else model.lm_head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    gates = [block.mlp.gate for block in model.model.layers if hasattr(block.mlp, "gate")]
    losses, norms = [], []
    for step in range(case.steps):
        optimizer.zero_grad()
        mean = 0.0
        for number in range(total):
            x, labels = micro_batch(step, number)
            for index, layer in enumerate(layers):
                key = RandomKey(SEED, step, number)
                key.seed_layer(index)
                x = layer(x) if not hasattr(layer, "phases") else whole(
                    layer.phases(chunks=1), x, lambda phase, key=key, index=index: key.seed_layer(index, phase.number))
            loss = cross_entropy(x, labels)
            (loss / total).backward()
            mean += loss.item() / total
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip or math.inf)))
        optimizer.step()
        for gate in gates:
            counts = gate.tokens_per_expert.double()
            gate.e_score_correction_bias += BIAS_SPEED * torch.sign(counts.mean() - counts).float()
            gate.tokens_per_expert.zero_()
        losses.append(mean)
    return {"losses": losses, "norms": norms, "state": {k: v.detach().clone() for k, v in model.state_dict().items()}}


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses and norms within `tolerance` relative, parameters within `tolerance`, biases equal."""
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=tolerance, atol=0)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]), rtol=1e-4, atol=0)
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        exact = name.endswith("e_score_correction_bias")
        torch.testing.assert_close(found["state"][name], value, rtol=0, atol=0 if exact else tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")
