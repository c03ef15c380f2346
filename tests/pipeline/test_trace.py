"""Traces and plans as files: what Perfetto needs is there, and what was written comes back."""

from __future__ import annotations

import json

import pytest

from megatron_ext.pipeline import Pair, ScheduleError, Span, Times, schedule, simulate
from megatron_ext.pipeline.trace import read_plan, read_trace, recorded_steps, write_plan, write_rank_trace, write_trace

PLAN = schedule("dualpipe", 4, 8)
TIMELINE = simulate(PLAN, Times(0.02, 0.02, 0.01, 0.045, 0.001)).timeline


def record(folder, step=12, ranks=range(4), plan=PLAN, timeline=TIMELINE):
    for rank in ranks:
        write_rank_trace(folder, step, rank, timeline.ranks[rank], plan, clock_offset=100.0)


def same(one, other, shift=0.0):
    for a, b in zip(one.ranks, other.ranks, strict=True):
        assert [span.instruction for span in a] == [span.instruction for span in b]
        assert [t + shift for span in a for t in span[:2]] == pytest.approx([t for span in b for t in span[:2]])


def test_a_trace_has_what_perfetto_reads_and_comes_back(tmp_path):
    path = write_trace(tmp_path / "new" / "trace.json", TIMELINE, PLAN)
    data = json.loads(path.read_text())
    events = data["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    assert all({"name", "pid", "tid"} <= set(event) and event["tid"] >= 0 for event in events)
    boxes = [event for event in events if event["ph"] == "X"]
    assert len(boxes) == sum(map(len, TIMELINE.ranks))
    assert max(event["ts"] + event["dur"] for event in boxes) == pytest.approx(1000 * TIMELINE.end)  # no unit: ms
    assert boxes[0]["args"] == {"kind": "F", "direction": 0, "stage": 0, "micro_batch": 0}
    pairs = [event for event in boxes if event["cat"] == "FB"]
    assert all(set(event["args"]) == {"forward", "backward"} for event in pairs)
    assert [event["name"] for event in pairs if event["tid"] == 1] == [
        str(instruction) for instruction in PLAN.compute(0) if isinstance(instruction, Pair)]
    for rank in range(4):
        held = [e["args"]["held"] for e in events if e["ph"] == "C" and e["name"] == f"activations held, rank {rank}"]
        assert max(held) == TIMELINE.peak_activations(rank) and held[-1] == 0
    back = read_trace(path)
    same(TIMELINE, back)
    assert (back.name, back.chunks, back.unit) == ("dualpipe", 1, "")
    assert {"plan": "dualpipe", "stages": 4, "micro_batches": 8, "chunks": 1, "placement": PLAN.placement}.items() <= (
        data["otherData"].items())


def test_ranks_record_apart_and_are_read_together(tmp_path):
    record(tmp_path)
    assert sorted(p.name for p in (tmp_path / "step_000012").iterdir()) == [
        "plan.json", "rank_00000.json", "rank_00001.json", "rank_00002.json", "rank_00003.json"]
    for place in (tmp_path, tmp_path / "step_000012"):
        back = read_trace(place)
        same(TIMELINE, back, shift=100)
        assert (back.name, back.unit) == ("dualpipe, step 12", "s")
        assert read_plan(place) == PLAN
    with pytest.raises(ScheduleError, match="holds rank 2 alone; give the folder"):
        read_trace(tmp_path / "step_000012" / "rank_00002.json")


def test_the_last_whole_step_is_read(tmp_path):
    record(tmp_path, 2)
    record(tmp_path, 5)
    record(tmp_path, 9, ranks=(0, 2))  # the run stopped here
    assert recorded_steps(tmp_path) == [2, 5, 9]
    assert read_trace(tmp_path).name == "dualpipe, step 5"
    assert read_trace(tmp_path, 2).name == "dualpipe, step 2"
    with pytest.raises(ScheduleError, match="the files of rank 1, 3 are missing"):
        read_trace(tmp_path, 9)
    with pytest.raises(ScheduleError, match="step 4 was not recorded; the nearest that was is 5"):
        read_trace(tmp_path, 4)


def test_of_several_replicas_the_first_is_read(tmp_path):
    for replica in (10, 2, 0):
        record(tmp_path / f"replica_{replica}", step=replica)
    assert read_trace(tmp_path).name == "dualpipe, step 0"
    assert read_trace(tmp_path / "replica_10").name == "dualpipe, step 10"
    assert read_plan(tmp_path) == PLAN


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe_zb", "interleaved_paired"])
def test_plans_come_back_whole(name, tmp_path):
    plan = schedule(name, 4, 8)
    assert read_plan(write_plan(tmp_path / "plan.json", plan)) == plan
    timeline = simulate(plan).timeline
    same(timeline, read_trace(write_trace(tmp_path / "trace.json", timeline, plan)))


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match=r'no recorded step in it.*"trace"'):
        read_trace(tmp_path)
    file = tmp_path / "file.json"
    for content, message in (
            ("{", "not JSON"), ("[]", "one JSON object"), ('{"traceEvents": []}', "not a trace of ours")):
        file.write_text(content)
        with pytest.raises(ScheduleError, match=message):
            read_trace(file)
    with pytest.raises(ScheduleError, match=r"absent\.json: cannot be read: No such file"):
        read_trace(tmp_path / "absent.json")
    data = json.loads(write_trace(file, TIMELINE, PLAN).read_text())
    for event in data["traceEvents"]:
        event.get("args", {}).pop("stage", None)
    file.write_text(json.dumps(data))
    with pytest.raises(ScheduleError, match="a damaged trace"):
        read_trace(file)


def test_what_is_no_plan_is_refused(tmp_path):
    file = write_trace(tmp_path / "trace.json", TIMELINE, PLAN)
    with pytest.raises(ScheduleError, match="not a plan"):
        read_plan(file)
    for key, value, message in (("instructions", [[["F", 0]]], "a damaged plan"), ("stages", 3, "3 ranks"),
                                ("placement", [[0, 1, 2, 3], [0, 1, 2, 3]], "rank")):
        data = json.loads(write_plan(file, PLAN).read_text())
        file.write_text(json.dumps(data | {key: value}))
        with pytest.raises(ScheduleError, match=message):
            read_plan(file)


def test_an_idle_rank_and_empty_times_do_no_harm(tmp_path):
    spans = [Span(1.0, 1.0, span.instruction) for span in TIMELINE.ranks[0]]
    assert any(isinstance(span.instruction, Pair) for span in spans)
    write_rank_trace(tmp_path, 1, 0, spans, PLAN)
    write_rank_trace(tmp_path, 1, 1, [], PLAN)
    assert recorded_steps(tmp_path) == [1]
