"""DeepSpeed's own sections keep their meaning: monitors, timers, schedulers, optimizers, ZeRO's options."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

import megatron_ext
from megatron_ext.models import cross_entropy, deepseek_v3
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool


def run(changes: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    case = Case()
    config = {**equality.ds_config(case), **changes}
    model = megatron_ext.PipelineModule(layers=deepseek_v3(equality.model_config(case)), loss_fn=cross_entropy,
                                        base_seed=equality.SEED, config=config)
    engine, optimizer, _, scheduler = megatron_ext.initialize(model=model, config=config)
    data, losses, rates = equality.batches(engine, case), [], []
    for _ in range(steps):
        rates.append(engine.get_lr()[0])
        losses.append(float(engine.train_batch(data)))
    kinds = (type(engine.basic_optimizer).__module__, type(engine.basic_optimizer).__name__, type(optimizer).__name__)
    moments = {v.dtype for s in engine.basic_optimizer.state.values() for v in s.values()
               if torch.is_tensor(v) and v.dim()}
    return {"losses": losses, "rates": rates, "kinds": kinds, "moments": moments, "metrics": engine.metrics,
            "scheduler": type(scheduler).__name__, "steps": engine.global_steps, "samples": engine.global_samples}


def test_monitors_and_timers_are_fed(pool2: WorkerPool, tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    found = pool2.run(run, {"csv_monitor": monitor, "wall_clock_breakdown": True, "steps_per_print": 1})[0]
    written = {p.name: p for p in tmp_path.rglob("*.csv")}
    assert {"Train_Samples_train_loss.csv", "Train_Samples_lr.csv", "Train_Samples_grad_norm.csv",
            "Train_Samples_max_violation.csv"} <= written.keys()
    rows = list(csv.reader(written["Train_Samples_train_loss.csv"].open()))[1:]
    assert [int(row[0]) for row in rows] == [4, 8, 12]  # samples so far
    torch.testing.assert_close([float(row[1]) for row in rows], found["losses"])
    assert found["steps"] == 3 and found["samples"] == 12


def test_scheduler_moves_the_learning_rate(pool2: WorkerPool) -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10,
                                             "warmup_type": "linear"}}
    found = pool2.run(run, {"scheduler": warmup})[0]
    assert found["scheduler"] == "WarmupLR"
    assert found["rates"][1] < found["rates"][2] <= 1e-3


def test_torch_adam_stays_torchs(pool2: WorkerPool) -> None:
    params = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    ours = pool2.run(run, {"optimizer": {"type": "AdamW", "params": params}})[0]
    theirs = pool2.run(run, {"optimizer": {"type": "AdamW", "params": {**params, "torch_adam": True}}})[0]
    assert ours["kinds"][0].startswith("megatron_ext.") and theirs["kinds"][0].startswith("torch.optim")
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-6, atol=0)


def test_bf16_moments_where_asked_for(pool2: WorkerPool) -> None:
    section = {**equality.ds_config(Case())["megatron_ext"], "optimizer": {"moment_dtype": "bf16"}}
    assert pool2.run(run, {"megatron_ext": section})[0]["moments"] == {torch.bfloat16}
    assert pool2.run(run, {})[0]["moments"] == {torch.float32}


def test_bf16_with_fp32_accumulation_without_offload_is_still_zero(pool2: WorkerPool) -> None:
    """Stock DeepSpeed silently takes BF16_Optimizer here, which ignores ZeRO's options."""
    changes = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert pool2.run(run, changes)[0]["kinds"][2] == "PipelineZeroOptimizer"


def test_overlap_and_small_buckets_change_nothing(pool2: WorkerPool) -> None:
    plain = pool2.run(run, {})[0]["losses"]
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    torch.testing.assert_close(pool2.run(run, {"zero_optimization": zero})[0]["losses"], plain, rtol=1e-6, atol=0)


def infinite(zero: int) -> dict[str, Any]:
    """A batch whose gradient is not finite, then a good one."""
    case = Case(zero=zero)
    engine = equality.build(case)
    before = equality.gather(engine)
    with torch.no_grad():
        poisoned = next(p for n, p in engine.module.named_parameters() if n.endswith("q_a_layernorm.weight"))
        good = poisoned.clone()
        poisoned.fill_(float("nan"))
    engine.train_batch(equality.batches(engine, case))
    with torch.no_grad():
        poisoned.copy_(good)
    after = equality.gather(engine)
    skipped = engine.skipped_steps
    loss = float(engine.train_batch(equality.batches(engine, case)))
    return {"same": all(torch.equal(before[n], after[n]) for n in before), "skipped": skipped, "loss": loss}


def test_a_step_that_is_not_finite_is_skipped_and_moves_no_bias(pool2: WorkerPool) -> None:
    """Stock DeepSpeed without ZeRO is poisoned for good (facts: faults)."""
    for zero in (0, 1):
        found = pool2.run(infinite, zero)[0]
        assert found["same"] and found["skipped"] == 1
        assert 3.0 < found["loss"] < 5.0


def client_optimizer(kind: str) -> list[float]:
    """An optimizer of the caller's, for a model with experts, which ZeRO wants in groups of their own."""
    case = Case()
    config = equality.ds_config(case)
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True
    model = megatron_ext.PipelineModule(layers=deepseek_v3(equality.model_config(case)), loss_fn=cross_entropy,
                                        base_seed=equality.SEED, config=config)

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=equality.LR, betas=equality.BETAS, eps=equality.EPS,
                                 weight_decay=equality.DECAY)

    optimizer = make if kind == "callable" else make(model.parameters())
    engine, *_ = megatron_ext.initialize(model=model, optimizer=optimizer, config=config)
    data = equality.batches(engine, case)
    return [float(engine.train_batch(data)) for _ in range(3)]


def test_an_optimizer_of_the_callers_works_with_experts(pool2: WorkerPool) -> None:
    expected = pool2.run(run, {})[0]["losses"]
    for kind in ("callable", "instance"):
        torch.testing.assert_close(pool2.run(client_optimizer, kind)[0], expected, rtol=1e-6, atol=0)


def test_bf16_without_zero_takes_fp32_accumulation(pool2: WorkerPool) -> None:
    changes = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert pool2.run(run, changes)[0]["losses"][2] < 5


def refusals() -> list[str]:
    found = []
    case = Case()

    def attempt(change: dict[str, Any], optimizer: Any = None) -> None:
        config = {**equality.ds_config(case), **change}
        model = megatron_ext.PipelineModule(layers=deepseek_v3(equality.model_config(case)), loss_fn=cross_entropy,
                                            config=equality.ds_config(case))
        try:
            megatron_ext.initialize(model=model, config={k: v for k, v in config.items() if v is not None},
                                    optimizer=optimizer)
        except megatron_ext.UserError as error:
            found.append(str(error))

    attempt({"optimizer": None})
    section = {**equality.ds_config(case)["megatron_ext"], "optimizer": {"moment_dtype": "bf16"}}
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    attempt({"megatron_ext": section, "optimizer": None}, sgd)
    attempt({"gradient_clipping": 1.0 + torch.distributed.get_rank()})
    engine = equality.build(case)
    for wrong in (lambda: engine.eval_batch(None), engine.train_batch, engine.train_batch,
                  lambda: engine.eval_batch(iter(()), reduce_output="sum"), lambda: engine(torch.zeros(1))):
        try:
            wrong()
        except (megatron_ext.UserError, RuntimeError) as error:
            found.append(str(error))
    return found


def test_what_cannot_work_is_refused_on_every_rank(pool2: WorkerPool) -> None:
    found = pool2.run(refusals)
    assert found[0] == found[1]
    no_optimizer, moments, differs, no_eval, no_data, broken, reduce, forward = found[0]
    assert "zero_optimization.stage = 1" in no_optimizer and "there is none" in no_optimizer
    assert "moment_dtype = 'bf16'" in moments and "SGD" in moments
    assert differs.startswith("gradient_clipping = '2.0': rank 1 has this and rank 0 has 1.0")
    assert "eval_batch: there is no data" in no_eval
    assert "train_batch: there is no data" in no_data and "training_data" in no_data
    assert "an earlier step failed" in broken
    assert "reduce_output = 'sum'" in reduce
    assert "train_batch()" in forward


def evaluate_first() -> tuple[float, float, int]:
    """Evaluation data may be the same on every shard."""
    case = Case()
    engine = equality.build(case)

    def same() -> Any:
        while True:
            yield equality.micro_batch(0, 0)

    loss = float(engine.eval_batch(same()))
    each = engine.eval_batch(same(), reduce_output=None)
    return loss, float(each.mean()), each.numel()


def test_evaluation_reads_what_it_is_given(pool2: WorkerPool) -> None:
    loss, mean, count = pool2.run(evaluate_first)[0]
    assert count == 4
    assert abs(loss - mean) < 1e-6
