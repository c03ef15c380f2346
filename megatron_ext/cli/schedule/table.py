"""`megatron-ext schedule compare`: every schedule for the same sizes and times, in one table."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from megatron_ext.cli.schedule.memory import Job
from megatron_ext.config.errors import ConfigError, UserError
from megatron_ext.pipeline.bounds import any_placement_bound, lower_bound
from megatron_ext.pipeline.schedules import NAMES, chunks_of, placement_of, schedule
from megatron_ext.pipeline.simulator import Result, Times, simulate


@dataclass(frozen=True)
class Row:
    """One schedule.

    Attributes:
        name, chunks: which.
        copies: of every weight, over all ranks.
        result: None if it cannot have these sizes.
        bound: no order on its placement is shorter.
        memory: peak bytes of the fullest rank, or in words why that cannot be said; None if nobody asked.
        error: why it cannot have these sizes.
    """

    name: str
    chunks: int
    copies: int = 1
    result: Result | None = None
    bound: float = 0.0
    memory: int | str | None = None
    error: UserError | None = None

    @property
    def makespan(self) -> float:
        return float("inf") if self.result is None else self.result.makespan


def rows(names: Sequence[str], stages: int, micro_batches: int, chunks: Sequence[int], times: Times,
         memory_limit: float | None, job: Job | None, progress: Console | None = None) -> list[Row]:
    """A row for each schedule and number of chunks, fastest first, then those that cannot be.

    Args:
        names: all schedules if empty.
        chunks: for schedules with a choice; the others have their own number.
        progress: where a bar is shown, if anywhere.

    Raises:
        ConfigError: a name that is no schedule's, a number of chunks below 1, a memory limit of nothing.
    """
    for count in chunks:
        if count < 1:
            raise ConfigError("--chunks", count, "every rank holds at least one stage of a direction", "try 2")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError("--memory-limit", memory_limit, "it counts activations and is more than 0")
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.4)
            raise ConfigError("schedule", name, f"no such schedule; known: {', '.join(NAMES)}",
                              f"did you mean {near[0]!r}?" if near else None)
    wanted = [(name, count) for name in names or NAMES for count in _counts(name, chunks)]
    todo = wanted if progress is None else track(wanted, "simulating", console=progress, transient=True)
    found = [_row(name, count, stages, micro_batches, times, memory_limit, job) for name, count in todo]
    return sorted(found, key=lambda row: row.makespan)


def _counts(name: str, chunks: Sequence[int]) -> list[int]:
    """The numbers of chunks that a schedule can have, of those given; its own if it can have none of them."""
    counts = []
    for count in chunks:
        try:
            counts.append(chunks_of(name, count))
        except ConfigError:
            continue
    return sorted(set(counts)) or [chunks_of(name)]


def _row(name: str, chunks: int, stages: int, micro_batches: int, times: Times, memory_limit: float | None,
         job: Job | None) -> Row:
    try:
        plan = schedule(name, stages, micro_batches, times, chunks, memory_limit)
        result = simulate(plan, times)
    except UserError as error:
        return Row(name, chunks, error=error)
    memory: int | str | None = None
    if job is not None:
        try:
            memory = max(job.peak_bytes(plan, result.timeline))
        except UserError as error:
            memory = _reason(error)
    bound = lower_bound(plan.placement, micro_batches, times, memory_limit)
    return Row(name, plan.chunks, len(plan.placement), result, bound, memory)


def _reason(error: UserError) -> str:
    if isinstance(error, ConfigError):
        return f"{error.rule} ({error.hint})" if error.hint else error.rule
    return str(error)


def _none_fits(found: Sequence[Row], stages: int, micro_batches: int, times: Times,
               memory_limit: float | None) -> ConfigError:
    """What to say where no schedule can be: if a higher limit would help, the nearest one and whose it is."""
    sizes = f"{stages} stages, {micro_batches} micro-batches"
    limited = [row for row in found if isinstance(row.error, ConfigError) and row.error.key == "pipeline.memory_limit"]
    if not limited:
        reasons = dict.fromkeys(f"{row.name}: {_reason(row.error)}" for row in found if row.error)
        return ConfigError("sizes", sizes, "no schedule can have them", "; ".join(reasons))
    least = [(_least_limit(row, stages, micro_batches, times), row.chunks, row.name) for row in limited]
    limit, chunks, name = min(least)
    label = repr(name) if chunks == 1 else f"{name!r} with {chunks} chunks"
    return ConfigError("--memory-limit", memory_limit, f"no schedule with {sizes} holds so few activations",
                       f"the nearest limit that one keeps is {limit:g}: {label}")


def _least_limit(row: Row, stages: int, micro_batches: int, times: Times) -> float:
    """Activations to allow for a schedule: one of each direction if it keeps limits, else what it holds without one."""
    least = float(len(placement_of(row.name, stages, row.chunks)))
    try:
        schedule(row.name, stages, micro_batches, times, row.chunks, least)
    except ConfigError:
        return max(simulate(schedule(row.name, stages, micro_batches, times, row.chunks), times).peak_activations)
    return least


def _any_placement(found: Sequence[Row], stages: int, micro_batches: int, times: Times,
                   memory_limit: float | None) -> str:
    """The bound for every schedule there could be with as many chunks and copies as those in the table."""
    chunks, copies = (max(getattr(row, name) for row in found if row.result) for name in ("chunks", "copies"))
    bound = min(any_placement_bound(stages, micro_batches, c, k, times, memory_limit)
                for c in range(1, chunks + 1) for k in range(1, copies + 1))
    return (f"no schedule of any placement, with up to {chunks} chunk{'s' * (chunks > 1)} and {copies} "
            f"cop{'ies' if copies > 1 else 'y'} of the weights, can be below {bound:.6g}")


def show(names: Sequence[str], stages: int, micro_batches: int, chunks: Sequence[int], times: Times,
         memory_limit: float | None, job: Job | None) -> None:
    """Prints the table; see `rows`.

    Raises:
        ConfigError: a name that is no schedule's, or sizes that no schedule can have.
    """
    terminal = Console(stderr=True)
    found = rows(names, stages, micro_batches, chunks, times, memory_limit, job,
                 terminal if terminal.is_terminal else None)
    if all(row.result is None for row in found):
        raise _none_fits(found, stages, micro_batches, times, memory_limit)
    pair = f"{times.full_pair:g}" + (" (no gain)" if times.pair is None else "")
    title = (f"{stages} ranks, {micro_batches} micro-batches; F {times.forward:g}, I {times.input_grad:g}, "
             f"W {times.weight_grad:g}, pair {pair}, message {times.message:g}")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("schedule", no_wrap=True)
    for heading in ["weights", "chunks", "makespan", "bound", "bubble", "idle", "held"] + ["GB"] * (job is not None):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(found):
        best = index == 0
        if row.result is None:
            continue
        idle = sum(row.result.bubble) / (stages * row.result.makespan)
        cells = [f"{row.copies}x", str(row.chunks), f"{row.result.makespan:.6g}", f"{row.bound:.6g}",
                 f"{max(row.result.bubble):.4g}", f"{idle:.1%}", f"{max(row.result.peak_activations):g}"]
        if job is not None:
            cells.append(f"{row.memory / 1e9:.4g}" if isinstance(row.memory, int) else "-")
        table.add_row(f"{row.name}{' ★' if best else ''}", *cells, style="bold green" if best else None)
    console = Console(highlight=False)
    console.print(table)
    for row in found:
        why = _reason(row.error) if row.error else row.memory if isinstance(row.memory, str) else ""
        if why:
            label = row.name if row.chunks == 1 else f"{row.name} with {row.chunks} chunks"
            console.print(f"  [bold]{label}[/bold]: {escape(why)}", soft_wrap=True)
    console.print(_any_placement(found, stages, micro_batches, times, memory_limit), soft_wrap=True)
    notes = ("★ shortest step; bound: no order on this placement is shorter; bubble: of the rank that idles most; "
             "held: activations on the rank that holds most")
    if job is not None:
        notes += "; GB: there, weights, FP32 gradients and activations, optimizer states apart"
    console.print(notes, style="dim", soft_wrap=True)
