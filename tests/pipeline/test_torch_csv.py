"""Plans and torch's pipelining exchange files that either side accepts."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torchs

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline import Pair, ScheduleError, Times, schedule, simulate
from megatron_ext.pipeline.torch_csv import export_csv, import_csv

ONE_DIRECTION = [("1f1b", 4, 8), ("gpipe", 2, 3), ("zb_h1", 4, 6), ("interleaved", 4, 8), ("interleaved_paired", 2, 4),
                 ("zbv", 4, 9), ("dualpipev", 4, 10), ("wave", 4, 8)]
TIMES = Times(1.0, 1.25, 0.75, pair=2.5, message=0.1)


def stages(ranks: int, rank: int, chunks: int) -> list[SimpleNamespace]:
    """What torch's schedules ask of the stages of a rank."""
    total = ranks * chunks
    return [SimpleNamespace(stage_index=i, num_stages=total, group_size=ranks, group_rank=rank, is_first=i == 0,
                            is_last=i == total - 1, submod=None, has_backward=True) for i in range(chunks)]


def torch_schedule(kind: str, ranks: int, micro_batches: int):
    """One of torch's own, on no process group."""
    return getattr(torchs, kind)(stages(ranks, 0, 2), micro_batches, loss_fn=lambda *_: None)


@pytest.mark.parametrize(("name", "ranks", "micro_batches"), ONE_DIRECTION)
def test_an_exported_plan_is_read_by_torch_and_comes_back_the_same(name, ranks, micro_batches, tmp_path):
    plan = schedule(name, ranks, micro_batches, TIMES)
    path = export_csv(plan, tmp_path / "new" / "plan.csv")

    runtime = torchs._PipelineScheduleRuntime(stages(ranks, 0, plan.chunks), micro_batches, loss_fn=lambda *_: None)
    runtime._load_csv(str(path))  # validates, and adds sends and receives
    assert runtime.stage_index_to_group_rank == dict(enumerate(plan.placement[0]))
    assert [len([a for a in runtime.pipeline_order[rank] if a]) for rank in range(ranks)] == [
        len(plan.compute(rank)) for rank in range(ranks)]

    back = import_csv(path, plan.name)
    assert [back.compute(rank) for rank in range(ranks)] == [plan.compute(rank) for rank in range(ranks)]
    assert back.placement == plan.placement and back.micro_batches == micro_batches
    ours, theirs = simulate(plan, TIMES), simulate(back, TIMES)
    assert (theirs.makespan, theirs.peak_activations) == (ours.makespan, ours.peak_activations)
    assert theirs.timeline == ours.timeline


@pytest.mark.parametrize("what", ["compute_only", "compute_comms"])
@pytest.mark.parametrize(("kind", "name"), [("ScheduleZBVZeroBubble", "zbv"), ("ScheduleDualPipeV", "dualpipev")])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 13), (8, 20)])
def test_schedules_of_torch_simulate_as_long_as_ours(kind, name, what, ranks, micro_batches, tmp_path):
    torch_schedule(kind, ranks, micro_batches)._dump_csv(str(tmp_path / "torch.csv"), what)
    plan = import_csv(tmp_path / "torch.csv")
    assert plan.name == "torch" and (plan.stages, plan.chunks, plan.micro_batches) == (ranks, 2, micro_batches)
    for times in (Times(), Times(pair=2.4), TIMES):
        assert simulate(plan, times).makespan == pytest.approx(
            simulate(schedule(name, ranks, micro_batches, times), times).makespan, abs=1e-9)


def test_a_plan_of_two_directions_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"schedule = 'dualpipe': runs in 2 directions.*dualpipev"):
        export_csv(schedule("dualpipe", 4, 8), tmp_path / "plan.csv")
    assert not (tmp_path / "plan.csv").exists()


def damaged(rows):
    """(what is wrong, rows) for a plan of two ranks."""
    first, second = rows
    yield "cell 2: '0X1' is no action", [[first[0], "0X1", *first[2:]], second]
    yield "not a valid schedule: .*rank 0 never runs the backward|not a valid schedule: .*nobody", [first[:-1], second]
    yield "stage 0 is in row 1 and in row 2", [first, [*second, "0F0"]]
    yield r"cell 1: '\(0F0;0W0\)OVERLAP_F_B' must hold one forward", [["(0F0;0W0)OVERLAP_F_B", *first[1:]], second]
    yield r"cell 1: '\(0F0;zzz\)OVERLAP_F_B' must hold one forward", [["(0F0;zzz)OVERLAP_F_B", *first[1:]], second]
    yield "stage 0 is in no row, though stage 1 is", [[], second]
    yield "not a valid schedule: .*comes after its|nobody uses it", [[first[0], first[0], *first[1:]], second]
    yield "no computation in it", [[], []]
    yield "row 2 has no computation in it", [first, [], second]
    yield "not a valid schedule: .*(deadlock|order of messages)", [
        ["0F0", "0B0", "0F1", "0B1", "0F2", "0B2", "0F3", "0B3"], ["1F1", "1B1", "1F0", "1B0", *second[4:]]]


@pytest.mark.parametrize("case", range(10))
def test_a_file_that_is_no_schedule_is_refused(case, tmp_path):
    plan = schedule("1f1b", 2, 4)
    path = export_csv(plan, tmp_path / "plan.csv")
    rows = list(csv.reader(path.open(newline="")))
    message, wrong = list(damaged(rows))[case]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(wrong)
    with pytest.raises(ScheduleError, match=rf"plan\.csv.*({message})"):
        import_csv(path)


def test_blank_rows_at_the_end_are_no_ranks(tmp_path):
    (tmp_path / "plan.csv").write_text("0F0,0B0\n\n,,\n")
    plan = import_csv(tmp_path / "plan.csv")
    assert (plan.stages, plan.micro_batches) == (1, 1)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ScheduleError, match="cannot be read as CSV"):
        import_csv(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(ScheduleError, match=r"binary\.csv"):
        import_csv(tmp_path / "binary.csv")


def test_pairs_keep_their_halves(tmp_path):
    (tmp_path / "pairs.csv").write_text("0F0,(1B0;0F1)OVERLAP_F_B\n".replace("1B0", "0B0") + "")
    with pytest.raises(ScheduleError, match="never runs"):
        import_csv(tmp_path / "pairs.csv")
    (tmp_path / "pairs.csv").write_text("0F0,,(0B0; 0F1)OVERLAP_F_B,0I1,0W1\n")
    order = import_csv(tmp_path / "pairs.csv").compute(0)
    assert isinstance(order[1], Pair) and order[1].forward.kind == "F" and order[1].backward.kind == "B"
