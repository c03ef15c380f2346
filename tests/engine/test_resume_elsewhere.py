"""Saved in one layout, resumed in another: the losses that follow are those of the run that went on, within 1e-6."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import nn

from megatron_ext.engine import elsewhere, restoring
from tests.distributed import equality, generic
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerError, WorkerPool
from tests.engine.test_checkpoint import build, moments, steps
from tests.engine.test_errors import caught
from tests.engine.test_load_from import mended

BEFORE, AFTER = 3, 3
BF16_MOMENTS = {"optimizer": {"moment_dtype": "bf16"}}
LINE = Case(stages=4, replicas=1, dropout=0.1)
GRID = Case(stages=2, replicas=2, dropout=0.1, micro_batches=2)
"""A global batch of four, as LINE."""


def save(case: Case, folder: Path) -> dict[str, Any]:
    engine = build(case)
    steps(engine, BEFORE)
    engine.save_checkpoint(str(folder), client_state={"note": [1, "two"]})
    found = about(engine)
    return {**found, "steps": steps(engine, AFTER), "end": equality.gather(engine)}


def resume(case: Case, folder: Path, already: int = 0) -> dict[str, Any]:
    engine = build(case)
    steps(engine, already)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        _, client_state = engine.load_checkpoint(str(folder))
    found = about(engine)
    return {**found, "said": said.getvalue(), "note": client_state, "steps": steps(engine, AFTER),
            "end": equality.gather(engine)}


def about(engine: Any) -> dict[str, Any]:
    """What a resume must bring back besides the weights, and these."""
    return {"counts": (engine.global_steps, engine.global_samples, engine.skipped_steps,
                       engine.training_dataloader.consumed_samples if engine.is_first_stage() else None),
            "optimizer": {(m.dtype, m.device.type) for m in moments(engine)},
            "taken": {int(s["step"]) for s in engine.basic_optimizer.state.values()},
            "state": equality.gather(engine)}


def check(wanted: dict[str, Any], found: list[dict[str, Any]], tolerance: float = 1e-6,
          weights: float = 1e-5) -> float:
    """Returns the largest difference of losses."""
    off = 0.0
    assert found[0]["said"].count("Random generators belong to ranks") == found[0]["said"].count("\n") == 1
    assert not any(rank["said"] for rank in found[1:])
    for rank in found:
        assert rank["counts"][:3] == wanted["counts"][:3] and rank["counts"][3] in (None, wanted["counts"][3])
        assert rank["taken"] == wanted["taken"] == {BEFORE}
        assert rank["note"] == {"note": [1, "two"]}
        assert rank["state"].keys() == wanted["state"].keys()
        for name, value in wanted["state"].items():  # biases of the routers among them
            assert rank["state"][name].equal(value), name
        for then, now in zip(wanted["steps"], rank["steps"], strict=True):
            assert now[0] == pytest.approx(then[0], abs=tolerance)
            assert now[1] == pytest.approx(then[1], rel=100 * tolerance) and now[2] == then[2]  # norm, learning rate
            off = max(off, abs(now[0] - then[0]))
        for name, value in wanted["end"].items():
            torch.testing.assert_close(rank["end"][name], value, rtol=0, atol=weights, msg=name)
    assert len({loss for loss, _, _ in wanted["steps"]}) == AFTER
    return off


EXPERTS, PLAIN = replace(GRID, expert_parallel=2), replace(GRID, zero=0)
JUMPS = {
    "P4D1-P2D2": (LINE, GRID),
    "ZeRO-1-2": (LINE, replace(LINE, zero=2)),
    "DualPipe-1F1B": (LINE, replace(LINE, schedule="1f1b")),
    "EP-1-2": (GRID, EXPERTS),
    "all": (LINE, replace(EXPERTS, zero=2, offload=True, schedule="1f1b")),
}
SLOW = {
    "P2D2-P4D1": (GRID, LINE),
    "EP-2-1": (EXPERTS, replace(GRID, schedule="1f1b")),
    "ZeRO-1-0": (EXPERTS, replace(GRID, zero=0)),
    "ZeRO-0-2": (replace(EXPERTS, zero=0), replace(LINE, zero=2)),
    "ZeRO-0-0": (PLAIN, replace(EXPERTS, zero=0, schedule="1f1b")),
    "chunks": (replace(GRID, schedule="dualpipe_interleaved", chunks=2), LINE),
    "wave": (LINE, replace(GRID, schedule="wave", chunks=2)),
    "untied": (replace(LINE, tied=False), replace(EXPERTS, tied=False)),
    "elastic": (replace(LINE, zero_options={"elastic_checkpoint": True}), EXPERTS),
    "order": (replace(LINE, zero=2), replace(LINE, zero=2, zero_options={"round_robin_gradients": True})),
}


@pytest.fixture(scope="module")
def saved(pool4: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and history of the save of a case, made once."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def save_once(case: Case) -> tuple[Path, dict[str, Any]]:
        if repr(case) not in made:
            folder = tmp_path_factory.mktemp("saved")
            made[repr(case)] = folder, pool4.run(save, case, folder)[0]
        return made[repr(case)]

    return save_once


@pytest.mark.parametrize("name", [*JUMPS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_steps_after_a_resume_elsewhere_are_those_of_the_uninterrupted_run(
        name: str, pool4: WorkerPool, saved: Any) -> None:
    then, now = {**JUMPS, **SLOW}[name]
    folder, wanted = saved(then)
    print("off by", check(wanted, pool4.run(resume, now, folder)))


def test_bf16_moments_leave_the_host_as_they_were(pool2: WorkerPool, tmp_path: Path) -> None:
    case = Case(stages=2, zero=2, offload=True, section=BF16_MOMENTS)
    wanted = pool2.run(save, case, tmp_path)[0]
    for zero in (1, 0):
        found = pool2.run(resume, replace(case, zero=zero, offload=False), tmp_path, already=1)
        print("off by", check(wanted, found, weights=1e-4))  # where a moment rounds the other way
        assert all(rank["optimizer"] == {(torch.bfloat16, "cpu")} for rank in found)


@pytest.mark.slow
def test_a_bf16_model_keeps_its_masters(pool4: WorkerPool, saved: Any) -> None:
    """Gradients are rounded to BF16 after a sum whose order is another: the losses part, as two layouts always do."""
    case = replace(EXPERTS, bf16=True, section=BF16_MOMENTS)
    folder, wanted = saved(case)
    for now in (replace(case, zero=2), replace(case, zero=0), replace(LINE, bf16=True, section=BF16_MOMENTS)):
        check(wanted, pool4.run(resume, now, folder), tolerance=0.05, weights=0.02)


@pytest.mark.slow
def test_gradients_in_round_robin_cannot_move(pool4: WorkerPool, saved: Any) -> None:
    """DeepSpeed's map of the partitions has another order than the partitions then."""
    folder, _ = saved(replace(LINE, zero=2, zero_options={"round_robin_gradients": True}))
    with pytest.raises(WorkerError, match=r"CheckpointError: .*round_robin_gradients = True; .*in the layout of"):
        pool4.run(resume, replace(LINE, zero=2), folder)


# -- a model that nobody wrote for this project


def strange() -> list[Any]:
    """Tied twice, a layer that is not trained, one with a buffer, a matrix without use."""
    layers = generic.tied()
    layers[5] = LayerSpec(generic.Frozen, generic.H, generic.H)
    layers[6] = LayerSpec(Shift, generic.H)
    layers[1] = LayerSpec(generic.HalfUsed, generic.H, generic.H)
    return layers


class Shift(nn.Linear):
    """A linear layer with a buffer that only a checkpoint can tell."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shift


STRANGE = generic.Job(model=strange, stages=4)


def save_strange(folder: Path) -> dict[str, Any]:
    engine = generic.build(STRANGE)
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if not value.requires_grad:
            value.data.fill_(0.25 if name.endswith("shift") else 0.125)
    data = generic.batches(engine, STRANGE)
    for _ in range(BEFORE):
        engine.train_batch(data)
    engine.save_checkpoint(str(folder))
    return {"state": equality.gather(engine), "losses": [float(engine.train_batch(data)) for _ in range(AFTER)]}


def resume_strange(job: generic.Job, folder: Path) -> dict[str, Any]:
    engine = generic.build(job)
    engine.load_checkpoint(str(folder))
    data, state = generic.batches(engine, job, BEFORE), equality.gather(engine)
    return {"state": state, "losses": [float(engine.train_batch(data)) for _ in range(AFTER)]}


def test_any_model_of_a_pipeline_resumes_elsewhere(pool4: WorkerPool, tmp_path: Path) -> None:
    wanted = pool4.run(save_strange, tmp_path)[0]
    for job in (replace(STRANGE, stages=2, replicas=2, micro_batches=2, zero=2),
                replace(STRANGE, stages=2, replicas=2, micro_batches=2, schedule="1f1b", zero=0)):
        for found in pool4.run(resume_strange, job, tmp_path):
            assert found["state"].keys() == wanted["state"].keys()
            assert all(found["state"][name].equal(value) for name, value in wanted["state"].items())
            assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-6)
    assert sum("table" not in name for name in wanted["state"]) > 4


# -- what is read


def count_reads(case: Case, folder: Path) -> tuple[int, int]:
    engine, numbers = build(case), []
    read = elsewhere.ShardNumbers.read

    def counted(self: Any, name: str, state: str | None, start: int, stop: int) -> torch.Tensor:
        numbers.append(stop - start)
        assert stop - start <= 512
        return read(self, name, state, start, stop)

    with patch.object(elsewhere.ShardNumbers, "read", counted), patch.object(restoring, "CHUNK", 512):
        engine.load_checkpoint(str(folder))
    return sum(numbers), sum(b.numel() for n, b in engine.module.named_buffers() if n.endswith("correction_bias"))


def test_every_number_is_read_once_and_a_few_at_a_time(pool4: WorkerPool, saved: Any) -> None:
    """Masters and two moments by the one rank that steps them; nobody reads the 16-bit weights, all read biases."""
    folder, wanted = saved(LINE)
    found = pool4.run(count_reads, EXPERTS, folder)
    trained = sum(value.numel() for name, value in wanted["state"].items() if not name.endswith("correction_bias"))
    assert sum(count for count, _ in found) == 3 * trained + sum(biases for _, biases in found)


# -- what may be left behind


def resume_in_part(folder: Path) -> list[Any]:
    found: list[Any] = []
    for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
        engine = build(GRID)
        engine.load_checkpoint(str(folder), **options)
        consumed = engine.training_dataloader.consumed_samples if engine.is_first_stage() else None
        found.append((engine.global_steps, consumed, bool(moments(engine)), equality.gather(engine)))
    return found


def test_weights_alone_and_everything_but_the_optimizer(pool4: WorkerPool, saved: Any) -> None:
    folder, wanted = saved(LINE)
    for rank in pool4.run(resume_in_part, folder):
        for (steps_taken, consumed, stateful, state), (count, read) in zip(rank, ((0, 0), (BEFORE, 12)), strict=True):
            assert (steps_taken, stateful) == (count, False) and consumed in (None, read)
            assert all(state[name].equal(value) for name, value in wanted["state"].items())


def refused_jumps(folder: Path) -> list[tuple[str, str, int | None]]:
    other = replace(GRID, zero=2)
    return caught([
        lambda: build(other, optimizer={"type": "SGD", "params": {"lr": 0.1}}).load_checkpoint(str(folder)),
        lambda: build(replace(other, bf16=True)).load_checkpoint(str(folder)),
        lambda: build(other).load_checkpoint(str(folder), custom_load_fn=lambda source, module: None),
        lambda: build(replace(other, tied=False)).load_checkpoint(str(folder))])


def test_a_jump_that_cannot_be_made_says_why_on_all_ranks(pool4: WorkerPool, saved: Any) -> None:
    folder, _ = saved(LINE)
    found = pool4.run(refused_jumps, folder)
    assert all([message for _, message, _ in rank] == [message for _, message, _ in found[0]] for rank in found)
    for (kind, message, _), text in zip(found[0], (
            "holds Adam's moments; this job has SGD", "was saved with bf16.enabled = False; this job has True",
            "in another layout (P 4 -> 2, D 1 -> 2, ZeRO 1 -> 2); custom_load_fn is for", "has no lm_head.weight"),
            strict=True):
        assert kind == "CheckpointError" and text in message, message


class Own:
    """What a training script may put into `client_state`."""

    epoch = 3


def save_with(case: Case, folder: Path, client_state: dict[str, Any]) -> None:
    engine = build(case)
    steps(engine, 1)
    engine.save_checkpoint(str(folder), client_state=client_state)


def client_state_of(case: Case, folder: Path) -> dict[str, Any]:
    return build(case).load_checkpoint(str(folder))[1]


def test_a_client_state_moves_if_it_is_data(pool2: WorkerPool, tmp_path: Path) -> None:
    small = Case(stages=2)
    data = {"random": np.random.RandomState(3).get_state(), "args": Namespace(lr=1e-3), "best": np.float32(0.5),
            "seen": {1, 2}, "tensor": torch.arange(3)}
    pool2.run(save_with, small, tmp_path / "data", data)
    pool2.run(save_with, small, tmp_path / "own", {"own": Own()})
    assert pool2.run(client_state_of, small, tmp_path / "own")[0]["own"].epoch == 3
    other = replace(small, schedule="1f1b")
    for found in pool2.run(client_state_of, other, tmp_path / "data"):
        assert found.keys() == data.keys() and (found["random"][1] == data["random"][1]).all()
        assert (found["args"], found["best"], found["seen"]) == (data["args"], data["best"], data["seen"])
        assert found["tensor"].equal(data["tensor"])
    with pytest.raises(WorkerError, match=r"names '.*\.Own', which.*; client_state is the likely place.*; "
                                          "load_checkpoint it in the layout of the save, or save client_state as"):
        pool2.run(client_state_of, other, tmp_path / "own")


def test_moments_without_a_step_are_refused(pool2: WorkerPool, tmp_path: Path) -> None:
    small = Case(stages=2)
    pool2.run(save_with, small, tmp_path, {})
    for file in (tmp_path / "global_step1").glob("zero_pp_rank_*"):
        mended(file.parent, file.name, lambda content: [
            state.pop("step") for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values()])
    with pytest.raises(WorkerError, match=r"CheckpointError: .*would have moments and no step"):
        pool2.run(client_state_of, replace(small, schedule="1f1b"), tmp_path)
