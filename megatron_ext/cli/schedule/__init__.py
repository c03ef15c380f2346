"""`megatron-ext schedule`: pipeline schedules drawn, compared, traced, exchanged with torch, and held against a run.

A SOURCE is the name of a schedule (with --stages and --micro-batches), a CSV of torch's pipelining, a plan.json, or the
folder that a run with `"pipeline": {"trace": "<folder>"}` has written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_ext.pipeline.instructions import Plan
    from megatron_ext.pipeline.simulator import Times
    from megatron_ext.pipeline.timeline import Timeline

app = typer.Typer(no_args_is_help=True, help="Draws, compares, traces, exports and imports pipeline schedules.")

Source = Annotated[str, typer.Argument(
    help="A schedule's name, a CSV of torch's pipelining, a plan.json, or the trace folder of a run.",
    show_default=False)]
Stages = Annotated[int | None, typer.Option("--stages", "-p", help="P, the number of pipeline ranks.")]
MicroBatches = Annotated[int | None, typer.Option("--micro-batches", "-m", help="Of all directions together.")]
Chunks = Annotated[int, typer.Option(help="Stages of one direction on each rank; 1 is the schedule's own number.")]
MemoryLimit = Annotated[float | None, typer.Option(
    help="Activations a rank may hold, each its share of the model for one micro-batch.")]
Forward = Annotated[float, typer.Option(help="Time of a forward of a rank's whole share of the model.")]
InputGrad = Annotated[float, typer.Option(help="Time of its input gradient.")]
WeightGrad = Annotated[float, typer.Option(help="Time of its weight gradient.")]
PairTime = Annotated[float | None, typer.Option("--pair", help="Time of a forward and a full backward that run as one; "
                                                "their sum if not given.")]
MessageTime = Annotated[float, typer.Option("--message", help="Time of a message between ranks.")]
PhasesFile = Annotated[Path | None, typer.Option(
    "--phases", help='A JSON of what a block takes, from which these times follow: {"attention": [F, I, W], '
    '"dispatch": D, "mlp": [F, I, W], "combine": C, "blocks": how many a rank has}.')]
StageLengths = Annotated[str | None, typer.Option(
    help="How the work lies along the model, from its beginning to its end, where it is not even: 1,1,1,1.4.")]
Step = Annotated[int | None, typer.Option(help="Which recorded step; the last whole one if not given.")]


@app.command()
def draw(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .svg, .png or .pdf.")] = Path("schedule.svg"),
    stages: Stages = None, micro_batches: MicroBatches = None, chunks: Chunks = 1, memory_limit: MemoryLimit = None,
    forward: Forward = 1.0, input_grad: InputGrad = 1.0, weight_grad: WeightGrad = 1.0, pair: PairTime = None,
    message: MessageTime = 0.0, phases: PhasesFile = None, stage_lengths: StageLengths = None, step: Step = None,
) -> None:
    """Draws a planned schedule, or a step as it ran: colour by kind and direction, idle time grey, memory beneath."""
    from megatron_ext.cli.schedule.durations import read_times
    from megatron_ext.pipeline.drawing import draw as draw_timeline

    times = read_times(forward, input_grad, weight_grad, pair, message, phases, stage_lengths)
    _, timeline = _open(source, stages, micro_batches, chunks, memory_limit, times, step)
    path = draw_timeline(timeline, output)
    _say(timeline)
    typer.echo(str(path))


@app.command()
def compare(
    names: Annotated[list[str] | None, typer.Argument(help="Schedules; all if none is given.")] = None,
    stages: Annotated[int, typer.Option("--stages", "-p", help="P, the number of pipeline ranks.")] = 8,
    micro_batches: Annotated[int, typer.Option("--micro-batches", "-m", help="Of all directions together.")] = 16,
    chunks: Annotated[list[int] | None, typer.Option(
        help="Stages of one direction on each rank, where a schedule has a choice; may be given again. "
        "[default: 2 and 4]", show_default=False)] = None,
    memory_limit: MemoryLimit = None,
    forward: Forward = 1.0, input_grad: InputGrad = 1.0, weight_grad: WeightGrad = 1.0, pair: PairTime = None,
    message: MessageTime = 0.0, phases: PhasesFile = None, stage_lengths: StageLengths = None,
    model: Annotated[Path | None, typer.Option(help="A model's config.json: adds the peak memory per rank.")] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Sequences in a micro-batch.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Positions of a sequence.")] = 4096,
    expert_parallel: Annotated[int, typer.Option(help="Ranks that share the experts of a layer.")] = 1,
    fp8: Annotated[bool, typer.Option("--fp8", help="Matrix products keep their inputs in FP8.")] = False,
) -> None:
    """Simulates schedules for the same sizes and times, in one table, best first."""
    from megatron_ext.cli.schedule import memory, table
    from megatron_ext.cli.schedule.durations import read_times

    job = None
    if model is not None:
        job = memory.Job.read(model, micro_batch_size, sequence_length, expert_parallel, fp8)
    times = read_times(forward, input_grad, weight_grad, pair, message, phases, stage_lengths)
    table.show(names or [], stages, micro_batches, chunks or [2, 4], times, memory_limit, job)


@app.command()
def trace(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .json for ui.perfetto.dev or chrome://tracing.")
                      ] = Path("trace.json"),
    stages: Stages = None, micro_batches: MicroBatches = None, chunks: Chunks = 1, memory_limit: MemoryLimit = None,
    forward: Forward = 1.0, input_grad: InputGrad = 1.0, weight_grad: WeightGrad = 1.0, pair: PairTime = None,
    message: MessageTime = 0.0, phases: PhasesFile = None, stage_lengths: StageLengths = None, step: Step = None,
) -> None:
    """Writes a Chrome trace: a thread per rank, and what each holds. One unit of simulated time is a millisecond."""
    from megatron_ext.cli.schedule.durations import read_times
    from megatron_ext.pipeline.trace import write_trace

    times = read_times(forward, input_grad, weight_grad, pair, message, phases, stage_lengths)
    plan, timeline = _open(source, stages, micro_batches, chunks, memory_limit, times, step)
    path = write_trace(output, timeline, plan)
    _say(timeline)
    typer.echo(str(path))


@app.command()
def export(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .csv.")] = Path("plan.csv"),
    stages: Stages = None, micro_batches: MicroBatches = None, chunks: Chunks = 1, memory_limit: MemoryLimit = None,
    forward: Forward = 1.0, input_grad: InputGrad = 1.0, weight_grad: WeightGrad = 1.0, pair: PairTime = None,
    message: MessageTime = 0.0, phases: PhasesFile = None, stage_lengths: StageLengths = None, step: Step = None,
) -> None:
    """Writes the CSV that torch.distributed.pipelining reads (compute_only); for schedules of one direction."""
    from megatron_ext.cli.schedule.durations import read_times
    from megatron_ext.pipeline.torch_csv import export_csv

    times = read_times(forward, input_grad, weight_grad, pair, message, phases, stage_lengths)
    plan, _ = _open(source, stages, micro_batches, chunks, memory_limit, times, step)
    typer.echo(str(export_csv(plan, output)))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A CSV of torch's pipelining, compute_only or compute_comms.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Writes the plan as JSON.")] = None,
    forward: Forward = 1.0, input_grad: InputGrad = 1.0, weight_grad: WeightGrad = 1.0, pair: PairTime = None,
    message: MessageTime = 0.0, phases: PhasesFile = None, stage_lengths: StageLengths = None,
) -> None:
    """Reads and verifies a CSV of torch.distributed.pipelining, and says what it is worth."""
    from megatron_ext.cli.schedule.durations import read_times
    from megatron_ext.pipeline.simulator import simulate
    from megatron_ext.pipeline.torch_csv import import_csv
    from megatron_ext.pipeline.trace import write_plan

    plan = import_csv(file)
    counts = ((plan.stages, "rank"), (plan.chunks, "stage"))
    ranks, stages = (f"{count} {word}{'s' * (count > 1)}" for count, word in counts)
    typer.echo(f"a valid schedule: {ranks} with {stages} each, {plan.micro_batches} micro-batches")
    times = read_times(forward, input_grad, weight_grad, pair, message, phases, stage_lengths)
    _say(simulate(plan, times).timeline)
    if output is not None:
        typer.echo(str(write_plan(output, plan)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help='What "pipeline": {"trace": ...} in the config names.')],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Draws plan and run: .svg, .png, .pdf.")] = None,
    step: Step = None,
    top: Annotated[int, typer.Option(help="How many late operations to name.")] = 10,
) -> None:
    """Holds a recorded step against its plan: what ran late, and where ranks idled.

    The plan is simulated with the medians of the run itself, so that what stands out is late compared with its like.
    """
    from megatron_ext.cli.schedule.report import show

    show(folder, step, top, output)


def _open(source: str, stages: int | None, micro_batches: int | None, chunks: int, memory_limit: float | None,
          times: Times, step: int | None) -> tuple[Plan, Timeline]:
    """The plan of a source, and its timeline: simulated, or as it ran."""
    from megatron_ext.config.errors import UserError
    from megatron_ext.pipeline.instructions import ScheduleError
    from megatron_ext.pipeline.schedules import NAMES, schedule
    from megatron_ext.pipeline.simulator import simulate
    from megatron_ext.pipeline.torch_csv import import_csv
    from megatron_ext.pipeline.trace import read_plan, read_trace

    path = Path(source)
    if source not in NAMES and path.is_dir():
        return read_plan(path, step), read_trace(path, step)
    if source not in NAMES and path.suffix in (".csv", ".json"):
        plan = import_csv(path) if path.suffix == ".csv" else read_plan(path)
    elif source not in NAMES and len(path.parts) > 1:
        raise ScheduleError(f"{source}: no such file, and no schedule's name; schedules are {', '.join(NAMES)}")
    elif source in NAMES and (stages is None or micro_batches is None):
        missing = "--stages" if stages is None else "--micro-batches"
        raise UserError(f"{source} is made for a size: give {missing}, for example {missing} 8")
    else:
        sizes = (2 if count is None else count for count in (stages, micro_batches))  # no name: refused by name
        plan = schedule(source, *sizes, times, chunks, memory_limit)
    return plan, simulate(plan, times).timeline


def _say(timeline: Timeline) -> None:
    """One line of facts."""
    length = timeline.end - timeline.start
    ranks = range(len(timeline.ranks))
    bubble, peak = max(map(timeline.idle, ranks)), max(map(timeline.peak_activations, ranks))
    unit = timeline.unit and f" {timeline.unit}"
    share = bubble / length if length else 0.0
    typer.echo(f"{timeline.name}: step {length:.6g}{unit}, largest bubble {bubble:.6g}{unit} ({share:.1%}), "
               f"peak {peak:g} activations")
