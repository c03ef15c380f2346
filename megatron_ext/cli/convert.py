"""`megatron-ext convert`: what the plan says, the progress, what was proved."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from megatron_ext.checkpoint.convert import FORMATS, Options, Plan, Source, make_plan, named, open_checkpoint
from megatron_ext.checkpoint.convert.stream import Progress as Told
from megatron_ext.checkpoint.convert.stream import run
from megatron_ext.checkpoint.convert.verify import verify
from megatron_ext.config.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Choice(NamedTuple):
    """What of a checkpoint is converted; see `make_plan`."""

    dtype: str | None
    optimizer: str | None
    weights: str


def convert(source: Path, destination: Path, to: str, from_: str | None, config: Path | None, options: Options,
            choice: Choice, workers: int, plan_only: bool, prove: bool, follow_links: bool) -> None:
    """Plans, and then shows the plan or carries it out; then proves it."""
    if workers < 0:
        raise UserError(f"--workers = {workers}: must not be negative")
    if plan_only and prove:
        raise UserError("--plan and --verify: a plan writes nothing that could be verified")
    opened = open_checkpoint(source, from_, config, follow_links)
    for note in opened.notes:
        typer.echo(f"note: {note}")
    plan = make_plan(opened, named(to), options, *choice)
    if plan_only:
        show(plan)
        if os.path.lexists(destination):
            typer.echo(f"{destination} already exists: it will be refused, or taken for done if it is this result")
        return
    typer.echo(summary(plan))
    if opened.carried and choice.dtype is None and "F8_E4M3" in plan.format.dtypes:
        typer.echo("the original FP8 scales are carried: --dtype fp8 brings the FP8 weights back")
    with bar("writing", plan.payload) as told:
        written = run(plan, destination, workers or _cores(plan), told)
    there = "" if written else ", already there"
    typer.echo(f"{destination}: {len(plan.files)} files, {gigabytes(plan.size)}{there}")
    if prove:
        with bar("verifying", 2 * plan.payload) as told:
            typer.echo(f"verified: {verify(plan, destination, told)}")


def _cores(plan: Plan) -> int:
    """As many workers as there are cores, and portions worth one."""
    return max(1, min(8, len(os.sched_getaffinity(0)), plan.payload >> 28))


def show(plan: Plan) -> None:
    """The plan in full; nothing is read for it but headers."""
    typer.echo(summary(plan))
    typer.echo(f"source: {describe(plan.source)}")
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for file in plan.files:
        for tensor in file.tensors:
            counts[tensor.dtype] += 1
            sizes[tensor.dtype] += tensor.nbytes
    for dtype in sorted(counts):
        typer.echo(f"  {dtype:8} {counts[dtype]:>9} tensors {gigabytes(sizes[dtype]):>12}")
    largest = max(plan.files, key=lambda file: file.size)
    typer.echo(f"files: {len(plan.files)}, {gigabytes(plan.size)} in all, the largest {largest.path} with "
               f"{gigabytes(largest.size)}")
    typer.echo(f"memory: {plan.memory / 2**20:.0f} MiB for each worker, beside what Python and torch take")
    for reason, count in Counter(plan.carried.values()).items():
        typer.echo(f"carried beside: {count} tensors ({reason})")
    if plan.aliases:
        typer.echo(f"left out as copies: {', '.join(sorted(plan.aliases))}")
    if plan.lossy:
        typer.echo(f"rounded: {len(plan.lossy)} tensors, {plan.lossy[0]} the first")
    if not plan.carried and not plan.aliases:
        typer.echo("everything has a counterpart")


def summary(plan: Plan) -> str:
    """One line."""
    tensors, payload = len(plan.source.stored), sum(stored.nbytes for stored in plan.source.stored)
    rounded = f", {len(plan.lossy)} tensors rounded" if plan.lossy else ""
    return (f"{plan.source.format} -> {plan.format.name}: {tensors} tensors, {payload} bytes -> "
            f"{plan.tensors} tensors, {plan.payload} bytes{'' if plan.dtype is None else f', {plan.dtype}'}{rounded}")


def describe(source: Source) -> str:
    """One line: family, layers, files."""
    model = source.model
    moe = sum(model.is_moe(layer) for layer in range(model.config.num_hidden_layers))
    dense = model.config.num_hidden_layers - moe
    title = next(format.title for format in FORMATS if format.name == source.format)
    extra = f" + {model.mtp_layers} for multi-token prediction" if model.mtp_layers else ""
    return (f"{title}, {model.config.model_type}, {dense} dense + {moe} MoE layers{extra}, "
            f"{model.config.n_routed_experts} experts, {source.reading.layout}")


def gigabytes(count: int) -> str:
    """A size for people."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.2f} kB"


def parse_size(text: str) -> int:
    """`5GB`, `500M`, `1e9`, `4096` -> bytes, in powers of ten.

    Raises:
        UserError: it is none of these.
    """
    plain = text.strip().upper().removesuffix("B")
    unit = plain[-1:] if plain[-1:] in _UNITS else ""
    try:
        size = int(float(plain.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise UserError(f"--shard-size = {text!r}: must be a size like 5GB") from None
    if 0 <= size < 1000:
        raise UserError(f"--shard-size = {text!r}: is {size} bytes; give a unit, as in 5GB")
    return size


@contextmanager
def bar(title: str, total: int) -> Iterator[Told]:
    console = Console(stderr=True)
    columns = (title, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)

