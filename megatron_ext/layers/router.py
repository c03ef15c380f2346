"""Which experts a token visits and with what weight (DeepSeek-V3 report, section 2.1.2; V2 report, section 2.1.3).

Everything here is FP32 whatever the model's dtype. V3: sigmoid scores; a correction bias, moved by the balancer and
never trained, is added for the choice only; the groups of experts with the best sum of two stay; weights are the
unbiased scores of the chosen, normalised and scaled. V2: softmax scores, all experts or the groups with the best single
expert.

Shape letters: N tokens, E experts, k experts of a token, G groups, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.protocol import LayerConfig

SCORING_FUNCTIONS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "greedy", "group_limited_greedy")


class Routing(NamedTuple):
    """Where N tokens go.

    Attributes:
        weights: [N, k] FP32, differentiable.
        experts: [N, k] int64, distinct within a token, best first.
    """

    weights: Tensor
    experts: Tensor


def check_routing(config: LayerConfig) -> tuple[int, int]:
    """The groups of experts, and how many of them a token can reach: 1 and 1 where there are none.

    Raises:
        ConfigError: for an unknown method, or groups that cannot hold k experts.
    """
    if config.scoring_func not in SCORING_FUNCTIONS:
        raise ConfigError("scoring_func", config.scoring_func, f"must be one of {', '.join(SCORING_FUNCTIONS)}")
    if config.topk_method not in TOPK_METHODS:
        raise ConfigError("topk_method", config.topk_method, f"must be one of {', '.join(TOPK_METHODS)}")
    if config.topk_method == "greedy":  # looks at all experts, whatever the groups say
        groups = chosen = 1
    else:
        groups = config.n_group or 1
        chosen = config.topk_group or groups
    experts = config.n_routed_experts
    if experts % groups:
        raise ConfigError("n_group", groups, f"must divide n_routed_experts = {experts}")
    if not 1 <= chosen <= groups:
        raise ConfigError("topk_group", chosen, f"must be 1 to n_group = {groups}")
    reachable = chosen * (experts // groups)
    if not 1 <= config.num_experts_per_tok <= reachable:
        raise ConfigError("num_experts_per_tok", config.num_experts_per_tok,
                          f"must be 1 to {reachable}, the experts in the {chosen} of {groups} groups of a token")
    return groups, chosen


class _Logits(torch.autograd.Function):
    """x W^T in FP32. Plain autograd would keep x in FP32; this keeps it in the model's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = (dy @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, (dy.t() @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, best first; among equal scores the lower index wins.

    `torch.topk` leaves ties to the implementation, which differs with device and shape: recompute, another layout or
    another backend could then send a token elsewhere. Scores and indices are packed into integers that order the same
    and never tie; 2.5 times faster than a stable sort (4096 x 256 on a CPU).

    Args:
        scores: [N, E] FP32, E < 65536; -inf never wins over a finite score.

    Returns:
        [N, k] int64.
    """
    bits = (scores.detach() + 0.0).view(torch.int32)  # + 0.0: -0 would order below 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    tie_break = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return ((ordered << 16) | tie_break).topk(k, dim=-1).indices


class Router(nn.Module):
    """The gate of one MoE layer.

    Attributes:
        weight: parameter [E, h].
        e_score_correction_bias: FP32 buffer [E] under `noaux_tc`, else None. FP32, bit for bit, under any dtype cast:
            at the biases of the published models (2 to 5) one BF16 spacing is 30 updates of 0.001.
        tokens_per_expert: int64 buffer [E], not saved: tokens routed here since the balancer last looked.
        count_tokens: whether a forward of training counts; None: if gradients are enabled. The executor says so for
            every phase, for recomputation runs it once without gradients, when it counts, and once with.

    Raises:
        ConfigError: see `check_routing`.
    """

    e_score_correction_bias: Tensor | None
    tokens_per_expert: Tensor

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.num_experts: int = config.n_routed_experts
        self.experts_per_token: int = config.num_experts_per_tok
        self.scoring_function: str = config.scoring_func
        self.method: str = config.topk_method
        self.normalise: bool = bool(config.norm_topk_prob)
        self.scale: float = config.routed_scaling_factor
        self.groups, self.groups_per_token = check_routing(config)
        self.count_tokens: bool | None = None

        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        has_bias = self.method == "noaux_tc"
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("tokens_per_expert", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Routing:
        """Routes tokens.

        Args:
            x: [N, h] in any floating dtype.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = _Logits.apply(x, self.weight)
            scores = logits.sigmoid() if self.scoring_function == "sigmoid" else logits.softmax(dim=-1)
            experts = self.choose(scores.detach())
            weights = self._weigh(scores.gather(-1, experts))
        if self.training and (torch.is_grad_enabled() if self.count_tokens is None else self.count_tokens):
            flat = experts.flatten()
            self.tokens_per_expert.scatter_add_(0, flat, torch.ones_like(flat))
        return Routing(weights, experts)

    def choose(self, scores: Tensor) -> Tensor:
        """[N, E] scores -> [N, k] experts, by bias and groups."""
        bias = self.e_score_correction_bias
        choice = scores if bias is None else scores + bias
        if self.groups_per_token < self.groups:
            by_group = choice.unflatten(-1, (self.groups, -1))
            if self.method == "noaux_tc":
                group_scores = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
            else:
                group_scores = by_group.amax(-1)
            kept = torch.zeros_like(group_scores, dtype=torch.bool)
            kept.scatter_(-1, top_k(group_scores, self.groups_per_token), True)
            # -inf, not 0: a negative bias can push every score of the kept groups below 0.
            choice = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        return top_k(choice, self.experts_per_token)

    def _weigh(self, scores: Tensor) -> Tensor:
        """[N, k] scores of the chosen -> [N, k] weights."""
        if not self.normalise:
            return scores * self.scale
        # V3 scales after normalising; V2's own code (softmax) scales only what it does not normalise.
        weights = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scale if self.scoring_function == "sigmoid" else weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves everything, but lets no cast (`.bfloat16()`, `.half()`, `.to(dtype)`) touch the bias."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self
