"""`megatron-ext schedule` from the outside: files appear, tables say what they must, errors are one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.parallel.placement import bidirectional, wave
from megatron_ext.pipeline import Times, schedule, simulate
from megatron_ext.pipeline.bounds import any_placement_bound, lower_bound
from megatron_ext.pipeline.phases import Phases
from megatron_ext.pipeline.trace import write_rank_trace

MODEL = Path(__file__).parents[2] / "examples" / "deepseek_v3_tiny.json"


def call(*arguments: object, code: int = 0) -> str:
    """What the command prints; on an error, its one line."""
    result = CliRunner().invoke(app, ["schedule", *map(str, arguments)], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    if code:
        assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
        return result.stderr
    return result.stdout


def table_row(text: str, name: str) -> list[str]:
    rows = [line.split() for line in text.splitlines()]
    [row] = [row for row in rows if row[:1] == [name] and len(row) > 5]
    return [cell for cell in row[1:] if cell != "★"]


@pytest.fixture
def recorded(tmp_path):
    """A run in which the first computation of rank 2 took 30 ms more."""
    plan = schedule("1f1b", 4, 6)
    timeline = simulate(plan, Times(0.02, 0.02, 0.02)).timeline
    for rank, spans in enumerate(timeline.ranks):
        moved = [span._replace(start=span.start + 0.03, end=span.end + 0.03) for span in spans]
        if rank == 2:
            moved[0] = moved[0]._replace(start=moved[0].start - 0.03)
        if rank < 2:
            moved[0] = spans[0]
        write_rank_trace(tmp_path / "trace", 7, rank, moved, plan)
    return tmp_path / "trace"


def test_draw(tmp_path):
    out = call("draw", "dualpipe", "--stages", 4, "--micro-batches", 8, "--pair", 2.4, "-o", tmp_path / "a.svg")
    assert "dualpipe: step 23.6, largest bubble" in out and "peak 5 activations" in out
    assert "activations held" in (tmp_path / "a.svg").read_text()


def test_compare_marks_the_best_and_says_why_others_cannot(tmp_path):
    out = call("compare", "-p", 4, "-m", 6, "1f1b", "zb_h1", "dualpipe", "interleaved")
    assert table_row(out, "zb_h1") == ["1x", "1", "21", "21", "3", "14.3%", "4"]
    assert table_row(out, "1f1b") == ["1x", "1", "27", "21", "9", "33.3%", "4"]
    assert table_row(out, "dualpipe")[0] == "2x"
    assert next(line.split()[0] for line in out.splitlines() if "★" in line) in ("zb_h1", "dualpipe")
    assert re.search(r"interleaved with 2 chunks: .*multiple of 4.*try", out)


def test_compare_says_how_short_a_step_can_be():
    out = call("compare", "-p", 4, "-m", 8, "--pair", 2.4, "--memory-limit", 3, "dualpipe_zb", "wave")
    times, rows = Times(pair=2.4), [line.replace("★", "").split() for line in out.splitlines()]
    for name, copies, chunks, place in (("dualpipe_zb", 2, 1, bidirectional(4)), ("wave", 1, 4, wave(4, 4))):
        [row] = [row for row in rows if row[:3] == [name, f"{copies}x", str(chunks)]]
        assert row[4] == f"{lower_bound(place, 8, times, 3):.6g}"
    least = min(any_placement_bound(4, 8, 4, copies, times, 3) for copies in (1, 2))
    assert f"of any placement, with up to 4 chunks and 2 copies of the weights, can be below {least:.6g}" in out


def phases_file(folder: Path, **changed: object) -> Path:
    """Of a block whose pair hides what a forward and backward alone wait for."""
    path = folder / "phases.json"
    path.write_text(json.dumps({"attention": [1, 1.5, 0.5], "dispatch": 0.75, "mlp": 2, "combine": 0.25} | changed))
    return path


def test_times_follow_from_phases_and_stage_lengths(tmp_path):
    phases = Phases(1, 0.75, 2, 0.25, 1.5, 2, 0.5, 2, blocks=3)
    times = replace(phases.times(message=0.5), stages=(1, 1, 1, 1.5))
    arguments = ("--phases", phases_file(tmp_path, blocks=3), "--message", 0.5, "--stage-lengths", "1,1,1,1.5")
    step = simulate(schedule("dualpipe", 4, 8, times), times).makespan
    out = call("compare", "-p", 4, "-m", 8, "dualpipe", *arguments)
    assert f"F {times.forward:g}, I {times.input_grad:g}, W 7.5, pair {phases.pair:g}, message 0.5" in out
    assert table_row(out, "dualpipe")[2] == f"{step:.6g}"
    assert f"step {step:.6g}, " in call("draw", "dualpipe", "-p", 4, "-m", 8, *arguments, "-o", tmp_path / "a.svg")


@pytest.mark.parametrize(("changed", "message"), [
    ({"mlp": [1, 2]}, r"--phases mlp = \[1, 2\]: \[F, I, W\], or one number"),
    ({"attention": -1}, "--phases attention = -1: .*not negative"),
    ({"dispatch": [1, 1, 1]}, "--phases dispatch = .*one number, forward and backward alike"),
    ({"combine": True}, "--phases combine = True: "),
    ({"blocks": 0}, "--phases blocks = 0: a rank has a whole number"),
    ({"atention": 1}, "--phases = .*it holds attention, dispatch, mlp, combine, atention"),
    ({"attention": 0, "dispatch": 0, "mlp": 0, "combine": 0}, "F, I and W do not all take no time"),
])
def test_impossible_phases_are_refused(changed, message, tmp_path):
    assert re.search(message, call("compare", "--phases", phases_file(tmp_path, **changed), code=1))


def test_compare_counts_bytes(tmp_path):
    arguments = ("compare", "-p", 2, "-m", 4, "1f1b", "dualpipe", "--model", MODEL, "--sequence-length", 256)
    out = call(*arguments)
    once, twice = (float(table_row(out, name)[-1]) for name in ("1f1b", "dualpipe"))
    assert 0.01 < once < 0.1 and twice > once
    assert float(table_row(call(*arguments, "--expert-parallel", 2), "1f1b")[-1]) < once
    assert float(table_row(call(*arguments, "--micro-batch-size", 3), "1f1b")[-1]) > 1.5 * once
    assert "must not exceed the 7 layers" in call("compare", "-p", 8, "-m", 8, "1f1b", "--model", MODEL)


def test_trace_is_for_perfetto(tmp_path):
    call("trace", "zb_h1", "-p", 2, "-m", 4, "-o", tmp_path / "t.json")
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) > 24


def test_export_import_and_what_is_made_of_the_file(tmp_path):
    call("export", "zbv", "-p", 4, "-m", 8, "-o", tmp_path / "zbv.csv")
    out = call("import", tmp_path / "zbv.csv", "-o", tmp_path / "plan.json")
    assert "a valid schedule: 4 ranks with 2 stages each, 8 micro-batches" in out and "step 25.5" in out
    assert "step 25.5" in call("draw", tmp_path / "zbv.csv", "-o", tmp_path / "a.png")
    assert "step 25.5" in call("trace", tmp_path / "plan.json", "-o", tmp_path / "t.json")


def test_report_names_what_ran_late(recorded, tmp_path):
    out = call("report", recorded, "-o", tmp_path / "both.svg")
    assert "1f1b, step 7: 570 ms, planned 540 ms (+5.6%)" in out
    [late] = [line for line in out.splitlines() if re.match(r"\s+\d+\s+2\s+F0\.0@2 ", line)]
    assert "took 30 ms longer" in late
    assert "1f1b, planned" in (tmp_path / "both.svg").read_text()
    assert "1f1b, step 7: step 0.57 s" in call("draw", recorded, "-o", tmp_path / "run.svg")


@pytest.mark.parametrize(("arguments", "message"), [
    (("draw", "dualpip", "-p", 4, "-m", 8), "did you mean 'dualpipe'"),
    (("draw", "dualpipe", "-p", 3, "-m", 8), r"pipeline\.stages = 3: .*try 2 or 4"),
    (("draw", "dualpipe", "-p", 4, "-m", 7), r"micro_batches = 7: .*try 6 or 8"),
    (("draw", "dualpipe", "-p", 4, "-m", 8, "--memory-limit", 2), r"pipeline\.memory_limit = 2.0: .*allow 5"),
    (("draw", "dualpipe", "-p", 4, "-m", 8, "-o", "a.gif"), r"a\.gif: a picture's name ends in one of \.png"),
    (("draw", "dualpipe", "-p", 4), "give --micro-batches"),
    (("draw", "nowhere/plan.csv"), r"nowhere/plan\.csv: cannot be read as CSV"),
    (("draw", "nowhere/run"), "nowhere/run: no such file, and no schedule's name"),
    (("trace", "dualpipe", "-p", 4, "-m", 8, "--forward", -1), r"^error: --forward = -1\.0: .*not negative$"),
    (("export", "dualpipe", "-p", 4, "-m", 8), "schedule = 'dualpipe': runs in 2 directions"),
    (("import", MODEL), "is no action"),
    (("report", "."), "no recorded step in it"),
    (("compare", "-p", 4, "-m", 8, "1f1bb"), "did you mean '1f1b'"),
    (("compare", "-p", 3, "-m", 4, "dualpipe", "chimera"), "no schedule can have them"),
    (("compare", "-p", 4, "-m", 8, "--memory-limit", 0.5),
     r"^error: --memory-limit = 0\.5: no schedule with 4 stages, 8 micro-batches holds so few activations; "
     r"the nearest limit that one keeps is 1: 'wave' with 2 chunks$"),
    (("compare", "-p", 4, "-m", 8, "--memory-limit", 1, "1f1b", "dualpipe"), r"keeps is 4: '1f1b'$"),
    (("compare", "--memory-limit", 0), r"--memory-limit = 0\.0: it counts activations"),
    (("compare", "--chunks", 0), r"^error: --chunks = 0: every rank holds at least one stage"),
    (("compare", "--message", -1), r"^error: --message = -1\.0: a duration is finite and not negative$"),
    (("compare", "--input-grad", "nan"), r"^error: --input-grad = nan: "),
    (("draw", "1f1b", "-p", 4, "-m", 8, "--pair", 0.2), r"^error: --pair = 0\.2: .*not shorter than its W, 1$"),
    (("compare", "--stage-lengths", "1,0"), r"--stage-lengths = '1,0': lengths above 0"),
    (("compare", "--stage-lengths", "1;2"), r"--stage-lengths = '1;2': lengths above 0"),
    (("compare", "--phases", "nowhere.json"), r"--phases = 'nowhere\.json': cannot be read as JSON"),
    (("compare", "--phases", MODEL), r"--phases = .*must hold attention, dispatch, mlp, combine"),
    (("compare", "--phases", MODEL, "--pair", 2), r"--phases = .*leave out --forward"),
    (("compare", "--model", "nowhere.json"), r"config\.json = 'nowhere\.json': cannot be read"),
    (("compare", "--model", MODEL, "--expert-parallel", 3), "must divide the 16 routed experts"),
])
def test_errors_are_one_line(arguments, message):
    assert re.search(message, call(*arguments, code=1))


def test_usage_errors_keep_their_exit_code():
    assert CliRunner().invoke(app, ["schedule", "draw"]).exit_code == 2
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
