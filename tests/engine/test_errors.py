"""What is wrong ends every rank, soon, with the same message; an error on one rank does not leave the others waiting.

Most of it runs on a few shared ranks, each of which catches its error. Two tests start processes as a launcher does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

import megatron_ext
from megatron_ext.config import ConfigError, UserError
from megatron_ext.data import IndexedDatasetWriter
from megatron_ext.models import cross_entropy, deepseek_v3
from megatron_ext.parallel import agreed
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerError, WorkerPool

ROOT = Path(megatron_ext.__file__).parent.parent
EXAMPLE = ROOT / "examples" / "pretrain_deepseek_v3.py"
FOUR = Case(stages=2, replicas=2, expert_parallel=2)
SMALL = Case(stages=2, replicas=1, zero=1, micro_batches=2)


def caught(attempts: Sequence[Callable[[], Any]]) -> list[tuple[str, str, int | None]]:
    """Per attempt (type, message, rank that found it) of the error."""
    found = []
    for attempt in attempts:
        try:
            attempt()
            found.append(("nothing", "", None))
        except UserError as error:
            found.append((type(error).__name__, str(error), error.rank))
    return found


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    node = config
    *path, leaf = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[leaf] = value
    return config


# -- the config

LINEARS = "three linear layers"
EXAMPLES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    # what is wrong, keys that make it so, what the message must say: key, value, rule
    ("odd P", {"megatron_ext.pipeline.stages": 3}, ("megatron_ext.pipeline.stages = 3", "even")),
    ("P does not divide the world", {"megatron_ext.pipeline.stages": 6},
     ("megatron_ext.pipeline.stages = 6", "must divide the 4 ranks")),
    ("more stages than layers",
     {LINEARS: True, "megatron_ext.pipeline.stages": 4, "megatron_ext.expert_parallel.size": 1},
     ("megatron_ext.pipeline.stages = 4", "must not exceed the 3 layers")),
    ("EP does not divide the experts", {"experts": 7},
     ("megatron_ext.expert_parallel.size = 2", "must divide the 7")),
    ("EP does not divide D", {"megatron_ext.pipeline.stages": 4},
     ("megatron_ext.expert_parallel.size = 2", "must divide", "4 ranks / 4 stages = 1")),
    ("ZeRO-3", {"zero_optimization.stage": 3}, ("zero_optimization.stage = 3", "not supported", "use 1 or 2")),
    ("fp16", {"fp16": {"enabled": True}}, ("fp16.enabled = True", "not supported", "bf16")),
    ("no accumulation", {"gradient_accumulation_steps": 0}, ("gradient_accumulation_steps = 0", "at least 1")),
    ("an unknown section of ours", {"megatron_ext.pipelin": {}},
     ("megatron_ext.pipelin = {}", "is not a key", "nearest name is megatron_ext.pipeline")),
    ("an unknown key of ours", {"megatron_ext.optimizer.moments_dtype": "bf16"},
     ("megatron_ext.optimizer.moments_dtype = 'bf16'", "nearest name is megatron_ext.optimizer.moment_dtype")),
    ("a section of later", {"megatron_ext.ema": {"decay": 0.999}}, ("megatron_ext.ema", "not available yet")),
    ("a key of later", {"megatron_ext.router.sequence_loss": 0.1},
     ("megatron_ext.router.sequence_loss = 0.1", "not available yet")),
    ("a phase of later", {"megatron_ext.recompute": ["mla_up_projection"]},
     ("megatron_ext.recompute.0 = 'mla_up_projection'", "not available yet")),
    ("no such schedule", {"megatron_ext.pipeline.schedule": "1f1c"},
     ("megatron_ext.pipeline.schedule = '1f1c'", "must be one of", 'did you mean "1f1b"')),
    ("chunks that the schedule has not", {"megatron_ext.pipeline.chunks": 2},
     ("megatron_ext.pipeline.chunks = 2", "dualpipe has 1 stage of each direction", "set it to 1")),
    ("a placement beside a schedule", {"megatron_ext.pipeline.placement": "wave"},
     ("megatron_ext.pipeline.placement = 'wave'", "is for the schedule", "remove one of the two")),
    ("accumulation that the schedule cannot have",
     {"megatron_ext.pipeline.schedule": "interleaved", "gradient_accumulation_steps": 3},
     ("gradient_accumulation_steps = 3", "interleaved on 2 ranks needs a multiple of 2", "try 2 or 4")),
    ("a memory limit that nothing fits", {"megatron_ext.pipeline.memory_limit": 1.5},
     ("megatron_ext.pipeline.memory_limit = 1.5", "dualpipe", "allow")),
    ("more chunks than layers", {"megatron_ext.pipeline.schedule": "wave", "megatron_ext.pipeline.chunks": 8},
     ("megatron_ext.pipeline.chunks = 8", "16 stages", "must not exceed the 7 layers")),
    ("other stages than built", {"built": {"num_stages": 4}},
     ("megatron_ext.pipeline.stages = 2", "was built with 4", "change one of the two")),
    ("another expert size than built", {"built": {"num_stages": 2}},
     ("megatron_ext.expert_parallel.size = 2", "was built with 1", "change one of the two")),
    ("an argument against the config", {"argument": {"num_stages": 4}},
     ("megatron_ext.pipeline.stages = 2", "PipelineModule was given 4")),
    ("a topology with a model axis", {"model axis": True}, ("topology = 'model'", "has size 2", "pipe and data")),
    ("an mpu", {"mpu": True}, ("mpu = 'object'", "brings its own")),
    ("no config", {"no config": True}, ("config = None", "a ds_config is needed")),
    ("a config that is not there", {"file": "/nowhere/ds_config.json"},
     ("config = '/nowhere/ds_config.json'", "there is no such file")),
]


def attempt(changes: dict[str, Any]) -> None:
    """Builds the module and the engine as a script would."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    special = {key: value for key, value in changes.items() if ("." not in key and " " in key) or key in SPECIAL}
    config = equality.ds_config(FOUR)
    for key, value in changes.items():
        if key not in special:
            changed(config, key, value)
    model_config = equality.model_config(FOUR)
    if "experts" in special:
        model_config = replace(model_config, n_routed_experts=special["experts"], n_group=1, topk_group=1)
    arguments: dict[str, Any] = {"config": special.get("file", config), **special.get("argument", {})}
    if "model axis" in special:
        arguments["topology"] = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    layers = [nn.Linear(4, 4) for _ in range(3)] if LINEARS in special else deepseek_v3(model_config)
    model = megatron_ext.PipelineModule(layers=layers, loss_fn=cross_entropy, **special.get("built", arguments))
    megatron_ext.initialize(model=model, config=None if "no config" in special else config,
                            mpu=object() if "mpu" in special else None)


SPECIAL = {"built", "argument", "mpu", "file", "experts"}


def attempt_all() -> list[tuple[str, str, int | None]]:
    return caught([lambda changes=changes: attempt(changes) for _, changes, _ in EXAMPLES])


@pytest.fixture(scope="module")
def refusals(pool4: WorkerPool) -> list[list[tuple[str, str, int | None]]]:
    return pool4.run(attempt_all)


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[name for name, *_ in EXAMPLES])
def test_a_config_that_cannot_work_is_refused_on_every_rank(
        number: int, refusals: list[list[tuple[str, str, int | None]]]) -> None:
    kind, message, rank = refusals[0][number]
    assert [found[number] for found in refusals] == [(kind, message, rank)] * 4
    assert kind == "ConfigError" and rank is None
    for text in EXAMPLES[number][2]:
        assert text in message
    assert "\n" not in message


# -- what only some ranks can see


class Unbuildable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise ConfigError("layer", 0, "cannot be built")


def built_on_some_ranks() -> list[tuple[str, str, int | None]]:
    from deepspeed.pipe import LayerSpec

    specs = [LayerSpec(nn.Linear, 4, 4), LayerSpec(Unbuildable), LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.Linear, 4, 4)]
    return caught([lambda: megatron_ext.PipelineModule(layers=specs, num_stages=4, partition_method="uniform")])


def test_a_layer_that_some_ranks_cannot_build_ends_all(pool4: WorkerPool) -> None:
    found = pool4.run(built_on_some_ranks)
    assert found == [[("ConfigError", "layer = 0: cannot be built", 1)]] * 4  # ranks 1 and 2 hold it


def unpicklable(group: Any) -> None:
    with agreed(group):
        if dist.get_rank() == 1:
            raise ConfigError("key", lambda: None, "holds what cannot travel")


def open_data(paths: list[str], vocab_size: int) -> None:
    """As the example does."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    args = Namespace(data=[paths[dist.get_rank()]], held_out=None, tokenizer=None, sequence_length=8)
    with agreed(dist.group.WORLD):
        example.open_data(args, vocab_size)


def unusable_data(good: str, large: str, short: str) -> list[tuple[str, str, int | None]]:
    return caught([lambda: open_data([large, large], 61), lambda: open_data([good, short], 61),
                   lambda: open_data([good, good], 61), lambda: unpicklable(dist.group.WORLD)])


def test_unusable_data_end_all_ranks_whoever_sees_it(pool2: WorkerPool, tmp_path: Path) -> None:
    for name, ids in (("good", range(60)), ("large", [*range(40), 61, *range(20)]), ("short", range(60))):
        with IndexedDatasetWriter(tmp_path / name, vocab_size=100) as writer:
            writer.add_document(list(ids))
    os.truncate(tmp_path / "short.bin", 30)
    found = pool2.run(unusable_data, *(str(tmp_path / f"{n}.idx") for n in ("good", "large", "short")))
    assert found[0] == found[1]
    large, short, good, strange = found[0]
    assert large[0] == "DataError" and large[2] is None
    assert "large" in large[1] and "token id 61 at its position 40" in large[1] and "0..60" in large[1]
    assert short[0] == "DataError" and short[2] == 1
    assert "short.bin: is short: it has 30 bytes" in short[1] and "describes" in short[1]
    assert good[0] == "nothing"
    assert strange[0] == "UserError" and "holds what cannot travel" in strange[1] and strange[2] == 1


# -- an error on one rank, in the middle of a step


def raise_in_a_step(where: str, rank: int, zero: int) -> None:
    case = replace(SMALL, zero=zero, micro_batches=4)
    engine = equality.build(case)
    batches = equality.batches(engine, case)
    engine.train_batch(batches)

    def boom(*_: Any) -> Tensor:
        raise KeyError(f"raised in the {where}")

    if dist.get_rank() == rank:
        if where == "loss":
            engine.module.loss_fn = boom
        else:  # when other parameters have their gradients already
            engine.module.get_parameter("model.layers.0.self_attn.q_a_layernorm.weight").register_hook(boom)
    engine.train_batch(batches)


@pytest.mark.parametrize(("where", "rank", "zero"), [("loss", 0, 1), ("hook", 1, 1), ("hook", 1, 2), ("hook", 0, 0)])
def test_an_error_in_a_step_comes_out_at_once(where: str, rank: int, zero: int, pool2: WorkerPool) -> None:
    """DeepSpeed would first reduce the gradients there are, and wait for peers that wait for this rank."""
    with pytest.raises(WorkerError, match=f"rank {rank} raised KeyError: 'raised in the {where}'"):
        pool2.run(raise_in_a_step, where, rank, zero, timeout=20)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


SCRIPT = """
import sys
import deepspeed.ops
deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled
import torch
torch.set_num_threads(1)
import megatron_ext
from megatron_ext.engine.agreement import user_errors_on_one_line
from tests.distributed import equality
from tests.engine import test_errors

megatron_ext.init_distributed()
with user_errors_on_one_line():
    engine = equality.build(test_errors.SMALL)
    data = equality.batches(engine, test_errors.SMALL)
    engine.train_batch(data)
    print("one step done", flush=True)
    if sys.argv[1] == "data":
        engine.train_batch(iter([]) if torch.distributed.get_rank() == 0 else data)
    else:
        test_errors.raise_in_a_step("loss", 1, 1)
"""


@pytest.mark.parametrize("where", ["data", "loss"])
def test_when_one_process_fails_the_others_end_too(where: str, tmp_path: Path) -> None:
    """Started side by side without a launcher, which would end the rest."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    common = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    processes = [subprocess.Popen([sys.executable, str(script), where], text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})
                 for r in range(2)]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert all("one step done" in output for output, _ in outputs)
    lines = [line for _, errors in outputs for line in errors.splitlines() if line.startswith("megatron_ext: ")]
    if where == "data":
        ended = "the data iterator ended at micro-batch 0 of 1 that a step needs"
        assert lines[0] == f"megatron_ext: rank 0: BatchError: {ended}"
        assert all("connection to a peer closed" in line for line in lines[1:])
        assert "Traceback" not in outputs[0][1] + outputs[1][1]
    else:
        assert lines == ["megatron_ext: rank 1 failed"]
        assert "KeyError: 'raised in the loss'" in outputs[1][1]
        assert "Traceback" in outputs[1][1] and "Traceback" not in outputs[0][1]


def test_the_example_under_the_launcher_ends_with_one_line(tmp_path: Path) -> None:
    config = json.loads((EXAMPLE.parent / "pretrain_deepseek_v3.json").read_text())
    config["megatron_ext"]["pipline"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = tmp_path / "no_builds.py"
    script.write_text("import runpy, sys\nimport deepspeed.ops\ndeepspeed.ops.__compatible_ops__ = {}\n"
                      f"sys.argv[0] = {str(EXAMPLE)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port(),
         str(script), "--deepspeed_config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")],
        cwd=ROOT, text=True, capture_output=True, timeout=90, env=ENVIRONMENT)
    assert done.returncode != 0
    assert time.monotonic() - start < 30
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "pipline" in line]
    assert len(lines) == 1
    assert lines[0].startswith("megatron_ext: ConfigError: megatron_ext.pipline = {}: is not a key here, where there ")
    assert lines[0].endswith("; the nearest name is megatron_ext.pipeline")
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
