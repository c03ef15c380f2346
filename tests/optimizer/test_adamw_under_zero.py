"""AdamW inside DeepSpeed's ZeRO on two ranks: what it holds, and that every load keeps BF16 moments and the bits.

Loads: DeepSpeed's ordinary checkpoint, its elastic one and its universal one. The second and third put FP32 tensors
into the optimizer's state behind its back.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.optimizer import AdamW, optimizer_state_bytes

LOADS = {"rigid": {}, "elastic": {"elastic_checkpoint": True}, "universal": {}}


def make_engine(stage: int, offload: bool, bf16: bool, universal: bool = False, **zero: Any) -> Any:
    import deepspeed

    torch.manual_seed(0)
    # 85 numbers: the ZeRO partitions of two ranks are padded
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 2),
                                torch.nn.Linear(2, 1))
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": bf16}, "zero_allow_untested_optimizer": True,
              "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 1.0,
              "zero_optimization": {"stage": stage, **zero}, "checkpoint": {"load_universal": universal}}
    optimizer = functools.partial(AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(10 * seed + engine.global_rank)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 8, generator=generator)
        loss = (engine(x.to(next(engine.module.parameters()).dtype)).float() - x[:, :1]).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def moments(engine: Any) -> list[torch.Tensor]:
    states = engine.optimizer.optimizer.state.values()
    return [state[key].clone() for state in states for key in ("exp_avg", "exp_avg_sq")]


def convert(folder: Path) -> None:
    """What `ds_to_universal` does, without its processes."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(Namespace(
        input_folder=str(folder / "tag"), output_folder=str(folder / "universal"), strict=True, num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, inject_missing_state=True))


def save_load_continue(folder: Path, load: str, stage: int, offload: bool, bf16: bool) -> dict[str, Any]:
    import torch.distributed as dist

    engine = make_engine(stage, offload, bf16, **LOADS[load])
    train(engine, 3, seed=1)
    held, saved = optimizer_state_bytes(engine.optimizer), moments(engine)
    engine.save_checkpoint(str(folder), tag="tag")
    expected = train(engine, 3, seed=2)
    if load == "universal" and engine.global_rank == 0:
        convert(folder)
    dist.barrier()
    again = make_engine(stage, offload, bf16, universal=load == "universal", **LOADS[load])
    again.load_checkpoint(str(folder), tag="universal" if load == "universal" else "tag")
    replaced = again.optimizer.optimizer.recast_moments() if offload else 0  # without it the next step mends them
    loaded = moments(again)
    losses = train(again, 3, seed=2)
    fragments = [p._hp_mapping.optim_fragment for p in again.module.parameters() if p._hp_mapping is not None]
    return {
        "held": held, "replaced": replaced, "expected": expected, "losses": losses,
        "equal": [torch.equal(a, b.to(a.dtype)) for a, b in zip(saved, loaded, strict=True)],
        "moments": {(m.device.type, m.dtype) for m in moments(again)},
        "fragments": {(key, tensor.dtype) for fragment in fragments for key, tensor in fragment.items()},
        "steps": [state["step"] for state in again.optimizer.optimizer.state.values()],
        "numel": again.optimizer.single_partition_of_fp32_groups[0].numel(),
    }


@pytest.mark.parametrize("load, stage, offload, bf16", [
    ("rigid", 1, True, True), ("rigid", 2, False, False), ("elastic", 1, True, False), ("elastic", 2, False, True),
    ("universal", 1, True, True), ("universal", 2, False, False)])
def test_moments_stay_bf16_and_a_resumed_run_has_the_same_bits(pool2, tmp_path, load, stage, offload, bf16):
    for rank in pool2.run(save_load_continue, tmp_path, load, stage, offload, bf16):
        assert rank["held"].parameters == rank["numel"]
        assert rank["held"].master == rank["held"].moments == {"cpu": 4 * rank["numel"]}
        assert rank["equal"] == [True, True] and rank["moments"] == {("cpu", torch.bfloat16)}
        assert rank["losses"] == rank["expected"] and rank["steps"] == [6]
        assert rank["fragments"] == {(key, torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}  # no FP32 kept alive
        assert rank["replaced"] == (0 if load == "rigid" or not offload else 2)
