"""`"schedule": "auto"` measures, chooses, switches between steps, keeps its choice; `"trace"` shows what ran."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_ext.config import ConfigError
from megatron_ext.engine.schedule_choice import MEASURED, ScheduleMixin
from megatron_ext.pipeline import choice
from megatron_ext.pipeline.simulator import Times
from megatron_ext.pipeline.trace import read_plan, read_trace, recorded_steps
from tests.distributed import generic
from tests.distributed.equality import compare, gather
from tests.distributed.generic import Job, batches, build
from tests.distributed.pool import WorkerPool

AUTO = Job(generic.deep, 4, micro_batches=8, steps=MEASURED + 3, schedule="auto")


@pytest.fixture(scope="module")
def pool3() -> Iterator[WorkerPool]:
    pool = WorkerPool(3)
    yield pool
    pool.close()


@functools.cache
def expected(job: Job) -> dict[str, Any]:
    return generic.reference(job)


def train(job: Job, times: Times, folder: str | None = None) -> dict[str, Any]:
    """With `times` in the place of what would be measured, so that every run chooses the same."""
    said = io.StringIO()
    with (patch("megatron_ext.engine.schedule_choice.measured_times", side_effect=lambda *_, **__: times) as measured,
          contextlib.redirect_stdout(said)):
        engine = build(job)
        data, names, losses, norms = batches(engine, job), [], [], []
        for _ in range(job.steps):
            names.append(engine.schedule)
            losses.append(float(engine.train_batch(data)))
            norms.append(float(engine.get_global_grad_norm()))
        messages = engine._time_messages()
        traced = recorded_steps(trace) if (trace := job.section.get("trace")) else None
        if folder is not None:
            engine.save_checkpoint(folder)
        return {"names": names, "losses": losses, "norms": norms, "state": gather(engine) if folder is None else None,
                "messages": messages, "why": engine._choice.why, "seen": [call.args[0] for call in measured.mock_calls],
                "plan": engine.plan(), "traced": traced, "said": said.getvalue()}


@pytest.mark.parametrize(("times", "first", "then"), [
    (Times(20, 20, 10, pair=32), "dualpipe", "dualpipe_interleaved"), (Times(20, 20, 20, message=1), "dualpipe", None)])
def test_measures_then_switches_and_trains_the_same(times: Times, first: str, then: str | None,
                                                    pool4: WorkerPool) -> None:
    found = pool4.run(train, AUTO, times)
    names = found[0]["names"]
    assert names[:MEASURED + 1] == [first] * (MEASURED + 1) and len(set(names[MEASURED + 1:])) == 1
    assert then is None or names[-1] == then
    assert all(rank["names"] == names and rank["plan"] == found[0]["plan"] and rank["why"] == found[0]["why"]
               for rank in found)
    compare(found[0], expected(replace(AUTO, stages=2, zero=0, schedule="dualpipe")))
    [seen] = found[0]["seen"]  # what rank 0 was given: every computation of every measured step
    kinds = {kinds for kinds, _ in seen}
    assert {"F", "FB", "B", "I", "W"} <= kinds and all(value > 0 for values in seen.values() for value in values)
    plan_f = sum(len(values) for (kinds, _), values in seen.items() if kinds[0] == "F")
    assert plan_f == MEASURED * AUTO.micro_batches * AUTO.stages
    assert all(0 < rank["messages"] < 1 for rank in found)


def resume(job: Job, folder: str) -> dict[str, Any]:
    engine = build(job)
    before = engine.schedule
    with patch.object(ScheduleMixin, "_choose", side_effect=AssertionError("measured again")):
        engine.load_checkpoint(folder)
        data = batches(engine, job)
        after = [engine.schedule]
        for _ in range(MEASURED + 2):
            engine.train_batch(data)
            after.append(engine.schedule)
    return {"before": before, "after": after, "plan": engine.plan()}


def test_a_resumed_job_keeps_the_choice(pool4: WorkerPool, tmp_path: Path) -> None:
    chosen = pool4.run(train, AUTO, Times(20, 20, 10, pair=32), str(tmp_path))[0]
    for rank in pool4.run(resume, AUTO, str(tmp_path)):
        assert rank["before"] == "dualpipe"
        assert rank["after"] == ["dualpipe_interleaved"] * (MEASURED + 3)
        assert rank["plan"] == chosen["plan"]
    named = replace(AUTO, schedule="dualpipe")
    assert set(pool4.run(resume, named, str(tmp_path))[0]["after"]) == {"dualpipe"}, "who names a schedule gets it"


def test_a_choice_that_no_longer_fits_makes_way(pool4: WorkerPool, tmp_path: Path) -> None:
    """Other sizes than it was chosen for: the next best of the same times, and not an error in the first step."""
    job = replace(AUTO, section={"schedule": "auto", "placement": "ring"}, schedule=None)
    times = Times(20, 20, 20, message=1)
    assert pool4.run(train, job, times, str(tmp_path))[0]["names"][-1] == "zb_h1"
    tight = replace(job, section={**job.section, "memory_limit": 3.0})
    found = pool4.run(resume, tight, str(tmp_path))
    assert set(found[0]["after"]) == {"wave"} and all(rank["plan"] == found[0]["plan"] for rank in found)


def test_the_choice_is_said_and_traced(pool2: WorkerPool, tmp_path: Path) -> None:
    job = replace(AUTO, stages=2, micro_batches=4, section={"trace": str(tmp_path)})
    found, other = pool2.run(train, job, Times(20, 20, 10, pair=32))
    assert found["traced"] == list(range(1, job.steps + 1)), "the measured steps, and those after the switch"
    assert found["said"].count("megatron_ext: schedule: ") == 2 and found["why"] in found["said"]
    assert "activations" in found["said"] and other["said"] == "", "once for the job"


def test_really_measured(pool2: WorkerPool) -> None:
    """Nothing put in its place: a choice comes out, and says why."""
    job = replace(AUTO, stages=2, micro_batches=4)
    found = pool2.run(really, job)
    assert found[0] == found[1]
    assert found[0][0] in ("dualpipe", "dualpipe_zb", "dualpipe_interleaved", "chimera")
    assert found[0][0] in found[0][1]


def really(job: Job) -> tuple[str, str]:
    engine = build(job)
    data = batches(engine, job)
    for _ in range(job.steps):
        engine.train_batch(data)
    return engine.schedule, engine._choice.why


def refused(job: Job) -> str:
    with pytest.raises(ConfigError) as error:
        build(job)
    return str(error.value)


@pytest.mark.parametrize(("section", "message"), [
    ({"memory_limit": 0.5}, "megatron_ext.pipeline.memory_limit = 0.5: no schedule of this placement on 2 ranks "
                            "holds so few activations; allow 2 ("),
    ({"placement": "ring"}, "megatron_ext.pipeline.placement = 'ring': the PipelineModule was built for"),
])
def test_what_cannot_be_is_refused_at_the_start(section: dict[str, Any], message: str, pool2: WorkerPool) -> None:
    for found in pool2.run(refused, replace(AUTO, stages=2, section={"schedule": "auto", **section})):
        assert found.startswith(message)


@pytest.mark.parametrize(("placement", "chunks", "stages", "replicas", "names"), [
    ("ring", 1, 3, 1, {"1f1b", "zb_h1", "wave"}), ("wave", 2, 2, 2, {"zbv", "dualpipev", "wave"}),
    ("bidirectional", 2, 2, 2, {"dualpipe_interleaved"}), ("ring", 2, 4, 1, {"interleaved", "interleaved_paired"})])
def test_every_placement(placement: str, chunks: int, stages: int, replicas: int, names: set[str],
                         pool3: WorkerPool, pool4: WorkerPool) -> None:
    section = {"schedule": "auto", "placement": placement, "chunks": chunks}
    job = replace(AUTO, stages=stages, replicas=replicas, micro_batches=4, schedule=None, section=section)
    pool = {3: pool3, 4: pool4}[stages * replicas]
    found = pool.run(train, job, Times(20, 20, 20, pair=48, message=1))
    assert found[0]["names"][-1] in names
    compare(found[0], expected(replace(job, stages=2, zero=0)))


# -- traces


def traced(job: Job) -> list[list[str]]:
    engine = build(job)
    data, ran = batches(engine, job), []
    for _ in range(job.steps):
        engine.train_batch(data)
        ran.append([str(i) for i in engine.plan().compute(engine.module.stage_rank)])
    dist.barrier()
    return ran


def test_a_trace_holds_what_ran(pool2: WorkerPool, tmp_path: Path) -> None:
    job = Job(generic.deep, 2, micro_batches=5, steps=4, schedule="wave", chunks=3, section={"trace": str(tmp_path)})
    ran = pool2.run(traced, job)
    assert recorded_steps(tmp_path) == [1, 2, 3], "the first three, and then every steps_per_print"
    plan = read_plan(tmp_path)
    assert plan.placement == [[0, 1, 1, 0, 0, 1]] and plan.micro_batches == 5
    timeline = read_trace(tmp_path, step=2)
    for rank, spans in enumerate(timeline.ranks):
        assert [str(span.instruction) for span in spans] == ran[rank][1]
        assert all(a.start <= a.end <= b.start for a, b in itertools.pairwise(spans))
    assert choice.PLACEMENTS["wave"](2, 3) == plan.placement
