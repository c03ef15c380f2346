"""What a DeepSeek-V3 block keeps from its forward to its backward: FP8 with its activation cache against BF16.

Counted, not timed, in two ways: every tensor that autograd saves, each storage once, weights left out, by hooks on
saved tensors; and, as the pipeline runs the block (pipeline/stage.py), everything that was made in a forward and is
still alive after it, whoever holds it. The widths are DeepSeek-V3's; only tokens and experts are fewer (a token goes to
8 of 8 experts), which changes no share. Attention on a CPU keeps its inputs in FP32, the same in both, so the whole
block's share is at its worst here.

    python benchmarks/saved_activations.py --json runs/benchmarks/saved_activations.json
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.fp8 import Precision
from megatron_ext.layers.block import TransformerBlock
from megatron_ext.models import DeepSeekV3Config
from megatron_ext.parallel.expert_parallel import ExpertParallel
from megatron_ext.pipeline.random import RandomKey
from megatron_ext.pipeline.stage import StageLayer, StageRun

V3 = dict(hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_attention_heads=128,
          q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
          n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=0, num_hidden_layers=1, vocab_size=128)
EXPERTS = dict(n_routed_experts=8, n_group=1, topk_group=1)
GOALS = {"expert half": 0.55, "whole block": 0.75, "whole block, in the pipeline": 0.75}


def block_of(widths: dict[str, Any]) -> TransformerBlock:
    """One block of experts in BF16 with arbitrary weights: no number is looked at."""
    with torch.device("meta"):
        block = TransformerBlock(DeepSeekV3Config(**widths, **EXPERTS), 0)
        block.set_expert_parallel(ExpertParallel.single())
    block = block.bfloat16().to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.fill_(1 / 64) if tensor.is_floating_point() else tensor.zero_()
    return block


def kept(block: TransformerBlock, run: Callable[[], Any]) -> Counter[str]:
    """Bytes that stay for backward, by dtype and shape."""
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages: dict[int, Tensor] = {}  # holds them: an address is not used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    found: Counter[str] = Counter()
    for tensor in storages.values():
        found[f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"] += tensor.untyped_storage().nbytes()
    return found


class Made(TorchDispatchMode):
    """Notes every storage that operators make while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                name = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                self.storages.setdefault(StorageWeakRef(storage), (name, storage.nbytes()))
        return result

    def alive(self, but: Iterable[Tensor]) -> Counter[str]:
        """Bytes of those that somebody still holds, but for these."""
        gc.collect()
        others = {tensor.untyped_storage()._cdata for tensor in but}
        found: Counter[str] = Counter()
        for storage, (name, size) in self.storages.items():
            if not storage.expired() and storage.cdata not in others:
                found[name] += size
        return found


def alive_in_pipeline(block: TransformerBlock, x: Tensor) -> Counter[str]:
    """What stays of one micro-batch's forward through the block as a stage, its input among it and its output not."""
    run, made = StageRun([StageLayer(block.phases(), 0)], RandomKey(0, 0, 0), training=True), Made()
    with made:
        steps = run.forward(x.clone().detach().requires_grad_())
        try:
            while True:
                next(steps)
        except StopIteration as end:
            y = end.value
    return made.alive((y, *block.parameters(), *block.buffers()))


def measure(widths: dict[str, Any], tokens: int, verbose: bool = False) -> dict[str, tuple[float, float]]:
    """Bytes per token in FP8 and in BF16, of the half from the second norm on and of the whole block."""
    block, sizes = block_of(widths), {}
    for precision in (Precision(fp8=True, dispatch_dtype="fp8"), Precision(dispatch_dtype="bf16")):
        block.set_precision(precision)
        x = torch.randn(1, tokens, widths["hidden_size"]).bfloat16().requires_grad_()
        parts = {"expert half": lambda x=x: block.mlp(block.post_attention_layernorm(x)),
                 "whole block": lambda x=x: block(x), "whole block, in the pipeline": lambda: None}
        for part, run in parts.items():
            found = alive_in_pipeline(block, x.detach()) if part.endswith("pipeline") else kept(block, run)
            sizes[part, precision.fp8] = sum(found.values()) / tokens
            if verbose:
                print(f"{part}, {'FP8' if precision.fp8 else 'BF16'}: " + ", ".join(
                    f"{name} {size / tokens:.0f}" for name, size in found.most_common(12)))
    return {part: (sizes[part, True], sizes[part, False]) for part in GOALS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--verbose", action="store_true", help="the largest tensors too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tokens < 1:
        parser.error("--tokens must be at least 1")
    rows = []
    for part, (fp8, bf16) in measure(V3, args.tokens, args.verbose).items():
        ratio, goal = fp8 / bf16, GOALS[part]
        rows.append({"name": f"saved activations of a V3 block, {part}, FP8", "value": fp8, "unit": "bytes a token",
                     "peer": "BF16", "peer_value": bf16, "ratio": ratio, "goal": f"at most {goal}",
                     "holds": ratio <= goal})
        print(f"{rows[-1]['name']}: {fp8:.0f} bytes a token; BF16 {bf16:.0f}; {ratio:.3f} (at most {goal})")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
