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
from megatron_ext.pipeline.schedules import NAMES, chunks_of, schedule
from megatron_ext.pipeline.simulator import Result, Times, simulate


@dataclass(frozen=True)
class Row:
    """One schedule.

    Attributes:
        name, chunks: which.
        copies: of every weight, over all ranks.
        result: None if it cannot have these sizes.
        memory: peak bytes of the fullest rank, or in words why that cannot be said; None if nobody asked.
        reason: why it cannot have these sizes.
    """

    name: str
    chunks: int
    copies: int = 1
    result: Result | None = None
    memory: int | str | None = None
    reason: str = ""

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
        ConfigError: a name that is no schedule's.
    """
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
        return Row(name, chunks, reason=_reason(error))
    memory: int | str | None = None
    if job is not None:
        try:
            memory = max(job.peak_bytes(plan, result.timeline))
        except UserError as error:
            memory = _reason(error)
    return Row(name, plan.chunks, len(plan.placement), result, memory)


def _reason(error: UserError) -> str:
    if isinstance(error, ConfigError):
        return f"{error.rule} ({error.hint})" if error.hint else error.rule
    return str(error)


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
        raise ConfigError("sizes", f"{stages} stages, {micro_batches} micro-batches", "no schedule can have them",
                          "; ".join(f"{row.name}: {row.reason}" for row in found))
    pair = f"{times.full_pair:g}" + (" (no gain)" if times.pair is None else "")
    title = (f"{stages} ranks, {micro_batches} micro-batches; F {times.forward:g}, I {times.input_grad:g}, "
             f"W {times.weight_grad:g}, pair {pair}, message {times.message:g}")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("schedule", no_wrap=True)
    for heading in ["weights", "chunks", "makespan", "bubble", "idle", "held"] + ["GB"] * (job is not None):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(found):
        best = index == 0
        if row.result is None:
            continue
        idle = sum(row.result.bubble) / (stages * row.result.makespan)
        cells = [f"{row.copies}x", str(row.chunks), f"{row.result.makespan:.6g}", f"{max(row.result.bubble):.4g}",
                 f"{idle:.1%}", f"{max(row.result.peak_activations):g}"]
        if job is not None:
            cells.append(f"{row.memory / 1e9:.4g}" if isinstance(row.memory, int) else "-")
        table.add_row(f"{row.name}{' ★' if best else ''}", *cells, style="bold green" if best else None)
    console = Console(highlight=False)
    console.print(table)
    for row in found:
        why = row.reason or (row.memory if isinstance(row.memory, str) else "")
        if why:
            label = row.name if row.chunks == 1 else f"{row.name} with {row.chunks} chunks"
            console.print(f"  [bold]{label}[/bold]: {escape(why)}", soft_wrap=True)
    notes = "★ shortest step; bubble: of the rank that idles most; held: activations on the rank that holds most"
    if job is not None:
        notes += "; GB: there, weights, FP32 gradients and activations, optimizer states apart"
    console.print(notes, style="dim", soft_wrap=True)
