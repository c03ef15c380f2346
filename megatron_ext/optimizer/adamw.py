"""AdamW with FP32 master weights and BF16 moments (DeepSeek-V3 report, section 3.3.2), on whatever device they lie.

It is a plain `torch.optim.Optimizer`, so DeepSpeed's ZeRO-1/2 shards and offloads it as any other: what it then steps
is the FP32 partition of the rank, and with moments in BF16 master weights and moments take 4 + 4 bytes a parameter
instead of 4 + 8. DeepSpeed's own BF16 states need BF16 master weights, which lose small updates.

Keeping the moments in BF16 takes more than creating them so: `torch.optim.Optimizer.load_state_dict` casts state to the
dtype of the parameter, and DeepSpeed's elastic and universal loads put FP32 tensors straight into `state`. The first is
overridden here; the others are mended by `recast_moments`, or else by the next `step`.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config.errors import ConfigError, UserError
from megatron_ext.kernels.reference.adamw import AdamWScalars
from megatron_ext.kernels.registry import OPERATORS

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, or with L2 regularisation (`adam_w_mode=False`).

    State of a parameter: "step" (int), "exp_avg" and "exp_avg_sq" (the parameter's shape and device, `moment_dtype`).
    The arithmetic is FP32 and the same, bit for bit, in every backend (kernels/reference/adamw.py).

    Args:
        params: FP32 or BF16 parameters, or groups of them. BF16 ones (ZeRO-0) round every update to BF16.
        lr, betas, eps, weight_decay, bias_correction, adam_w_mode, amsgrad: the parameters of DeepSpeed's "Adam" and
            "AdamW", with their defaults; `amsgrad` is refused.
        moment_dtype: "bf16" or "fp32", of the moments at rest.

    Raises:
        ConfigError: a hyperparameter out of its range, or parameters of another dtype.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, bias_correction: bool = True, adam_w_mode: bool = True,
                 amsgrad: bool = False, *, moment_dtype: str = "bf16"):
        if amsgrad:
            raise ConfigError("optimizer.params.amsgrad", amsgrad, "AMSGrad is not available")
        if moment_dtype not in _DTYPES:
            raise ConfigError("megatron_ext.optimizer.moment_dtype", moment_dtype, 'must be "bf16" or "fp32"')
        self.adam_w_mode = adam_w_mode
        self.moment_dtype = _DTYPES[moment_dtype]
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "bias_correction": bias_correction})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; checks what the group sets for itself too."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not float(group[name]) >= 0:
                raise ConfigError(f"optimizer.params.{name}", group[name], "must be a number of at least 0")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ConfigError("optimizer.params.betas", group["betas"], "must be two numbers of at least 0 and below 1")
        for p in group["params"]:
            if p.dtype not in _DTYPES.values():
                raise ConfigError("optimizer", str(p.dtype), "AdamW takes parameters in FP32 or BF16")
        # A BF16 number keeps 8 bits: one that shrinks by less than half its last bit rounds back to what it was.
        if self.moment_dtype == torch.bfloat16 and 1 - max(group["betas"]) <= 2**-8:
            warnings.warn(f"optimizer.params.betas = {group['betas']!r}: a moment in BF16 cannot decay by less than "
                          f"2^-8 of itself a step and would stay at its largest value; DeepSeek-V3 has [0.9, 0.95]")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients, if given.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # A parameter counts its own steps (some have no gradient at times): there may be several sets of scalars.
            by_step: dict[int, list[Tensor]] = defaultdict(list)
            for p in params:
                state = self._prepared_state(p, group)
                state["step"] += 1
                by_step[state["step"]].append(p)
            for step, stepped in by_step.items():
                scalars = AdamWScalars.at(
                    step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
                    weight_decay=group["weight_decay"], bias_correction=group["bias_correction"],
                    adam_w_mode=self.adam_w_mode)
                self._update(stepped, scalars)
            group["step"] = max(by_step)  # DeepSpeed's elastic checkpoints look for it here
        return loss

    def recast_moments(self) -> int:
        """Brings moments that a checkpoint put in place to `moment_dtype` and to their parameter's device.

        For after a load that bypasses `load_state_dict`. The tensors in `state` are replaced, so views of the old ones
        (DeepSpeed's `_hp_mapping.optim_fragment`) must be linked anew.

        Returns:
            How many tensors were replaced.

        Raises:
            UserError: a moment is not shaped like its parameter.
        """
        return sum(self._recast(p, self.state[p]) for p in list(self.state))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments of any dtype become `moment_dtype`, never the parameter's in between.

        Raises:
            UserError: a moment is not shaped like its parameter.
        """
        saved = state_dict["state"]
        others = {i: {key: value for key, value in state.items() if key not in MOMENTS} for i, state in saved.items()}
        super().load_state_dict({**state_dict, "state": others})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i in saved:
                self.state[p].update({key: saved[i][key] for key in MOMENTS if key in saved[i]})
                self._recast(p, self.state[p])
        for group in self.param_groups:  # a checkpoint of another Adam may lack some
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _prepared_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, made at its first step, with moments as they must be."""
        state = self.state[p]
        # torch's AdamW saves the step as a tensor, and a checkpoint may hold it in the group alone.
        state["step"] = int(state.get("step", group.get("step", 0))) if state else 0
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros(p.shape, dtype=self.moment_dtype, device=p.device)
        self._recast(p, state)
        return state

    def _recast(self, p: Tensor, state: dict[str, Any]) -> int:
        replaced = 0
        for key in MOMENTS:
            if key not in state:
                continue
            moment = state[key]
            if moment.shape != p.shape:
                raise UserError(f"optimizer state {key!r} has shape {list(moment.shape)} for a parameter of shape "
                                f"{list(p.shape)}: it is of another model or of another number of ranks")
            state[key] = moment.to(device=p.device, dtype=self.moment_dtype).contiguous()
            replaced += state[key] is not moment
        return replaced

    def _update(self, params: list[Tensor], scalars: AdamWScalars) -> None:
        by_device: dict[torch.device, list[tuple[Tensor, ...]]] = defaultdict(list)
        for p in params:
            grad = p.grad
            assert grad is not None
            if grad.is_sparse:
                raise UserError("AdamW takes no sparse gradients; build the embedding with sparse=False")
            grad = grad if grad.dtype in _DTYPES.values() else grad.float()
            moments = (self.state[p][key] for key in MOMENTS)
            by_device[p.device].append((p, p.contiguous(), grad.contiguous(), *moments))
        for updates in by_device.values():
            stored, *tensors = zip(*updates, strict=True)
            OPERATORS.select("adamw", *tensors).function(*tensors, scalars)
            for p, dense in zip(stored, tensors[0], strict=True):
                if dense is not p:  # a parameter that is no dense array, a transposed view say
                    p.copy_(dense)
