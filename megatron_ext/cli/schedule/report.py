"""`megatron-ext schedule report`: a recorded step beside its plan."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ext.pipeline.comparison import Comparison, Operation, compare
from megatron_ext.pipeline.drawing import draw_comparison
from megatron_ext.pipeline.timeline import describe
from megatron_ext.pipeline.trace import read_plan, read_trace


def show(folder: Path, step: int | None, top: int, output: Path | None) -> None:
    """Prints the late operations and the idle time of every rank; draws both timelines if `output` is given.

    Raises:
        ScheduleError: the folder holds no recorded step, or one of another plan.
    """
    comparison = compare(read_plan(folder, step), read_trace(folder, step))
    late = comparison.latest(top)
    console = Console(highlight=False)
    planned, ran = comparison.planned, comparison.ran
    lengths = planned.end - planned.start, ran.end - ran.start
    times = comparison.times
    console.print(f"[bold]{ran.name}[/bold]: {_time(lengths[1], ran.unit)}, planned {_time(lengths[0], ran.unit)} "
                  f"({lengths[1] / lengths[0] - 1:+.1%})", soft_wrap=True)
    durations = [("F", times.forward), ("I", times.input_grad), ("W", times.weight_grad), ("message", times.message)]
    if times.pair is not None:
        durations.insert(3, ("pair", times.pair))
    console.print("the plan was simulated with the medians of the run: "
                  + ", ".join(f"{name} {_time(length, ran.unit)}" for name, length in durations)
                  + (f"; its stages take {min(times.stages):.2f} to {max(times.stages):.2f} of these" if times.stages
                     else ""), soft_wrap=True)
    console.print(_late_table(comparison, late) if late else "nothing ran late")
    console.print(_idle_table(comparison))
    if output is not None:
        console.print(str(draw_comparison(comparison, output, late)), soft_wrap=True)


def _late_table(comparison: Comparison, late: list[Operation]) -> Table:
    unit = comparison.ran.unit
    table = Table(title="Ran late: worst first, without what each inherited", box=box.SIMPLE_HEAD,
                  title_justify="left", title_style="bold")
    for heading in ("#", "rank", "operation", "planned at", "ran at", "lost", "why"):
        words = heading in ("operation", "why")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "why")
    for number, operation in enumerate(late, 1):
        table.add_row(str(number), str(operation.rank), describe(operation.ran.instruction),
                      _time(operation.planned.start, unit), _time(operation.ran.start, unit),
                      _time(operation.delay, unit), _why(operation, unit))
    return table


def _why(operation: Operation, unit: str) -> str:
    reasons = []
    if operation.longer > 0.05 * operation.delay:
        reasons.append(f"took {_time(operation.longer, unit)} longer")
    if operation.waited > 0.05 * operation.delay:
        by = _time(operation.waited, unit)
        if operation.source is None:
            reasons.append(f"started {by} after it could have")
        else:
            reasons.append(f"waited {by} too long for rank {operation.source}")
    return "; ".join(reasons)


def _idle_table(comparison: Comparison) -> Table:
    planned, ran = comparison.planned, comparison.ran
    table = Table(title="Idle", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading in ("rank", "planned", "ran", "difference"):
        table.add_column(heading, justify="right")
    for rank in range(len(ran.ranks)):
        wanted, found = planned.idle(rank), ran.idle(rank)
        table.add_row(str(rank), _time(wanted, ran.unit), _time(found, ran.unit),
                      ("+" if found >= wanted else "-") + _time(abs(found - wanted), ran.unit))
    return table


def _time(seconds: float, unit: str) -> str:
    if unit == "s" and abs(seconds) < 1:
        return f"{seconds * 1000:.3g} ms" if abs(seconds) < 0.1 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.4g}{unit and ' ' + unit}"
