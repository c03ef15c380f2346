"""Plans to and from the CSV of `torch.distributed.pipelining`: a row per rank, a computation per cell.

    0F3                  forward of stage 0, micro-batch 3; likewise I (input gradient), W (weight gradient), B (both)
    (0F4;1B2)OVERLAP_F_B a forward and a backward that run as one
    (empty)              torch's schedules pad with these; they mean nothing

This is torch's format `compute_only` (2.13), which `_PipelineScheduleRuntime._load_csv` reads and which torch's own
schedules write with `_dump_csv(path, "compute_only")`. What `compute_comms` adds (3SEND_F1, 1UNSHARD, ...) follows from
the computations and is passed over. The format has one direction, so that a plan of two cannot be written.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline.instructions import Compute, Pair, Plan, ScheduleError
from megatron_ext.pipeline.verifier import verify

_ACTION = re.compile(r"(\d+)([FIWB])(\d+)")
_IMPLIED = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F\d+|RECV_F\d+|SEND_B\d+|RECV_B\d+)")
_PAIR = re.compile(r"\(([^;()]+);([^;()]+)\)OVERLAP_F_B")


def export_csv(plan: Plan, path: str | Path) -> Path:
    """Writes the computations of a plan; sends, receives and promises are left out, as torch makes its own.

    Raises:
        ConfigError: the plan has two directions.
    """
    if len(plan.placement) != 1:
        rule = f"runs in {len(plan.placement)} directions, and torch's pipelining has schedules of one"
        raise ConfigError("schedule", plan.name, rule, "one that keeps a single copy of the weights can be exported, "
                          "such as dualpipev, zbv or wave")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([_cell(instruction) for instruction in plan.compute(rank)]
                                   for rank in range(plan.stages))
    return path


def import_csv(path: str | Path, name: str | None = None) -> Plan:
    """The plan in a file, verified.

    Placement and sizes follow from the cells: a stage lies on the rank in whose row it is computed.

    Args:
        path: of the CSV.
        name: of the plan; the file's name without its ending if None.

    Raises:
        ScheduleError: the file cannot be read, a cell is no action, or the plan cannot run; says which row and cell.
    """
    path = Path(path)
    try:
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"{path}: cannot be read as CSV: {error}") from error
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()  # blank lines at the end are no ranks
    compute = [[instruction for column, cell in enumerate(row)
                for instruction in _instructions(cell, f"{path}: row {rank + 1}, cell {column + 1}")]
               for rank, row in enumerate(rows)]
    parts = [(rank, part) for rank, order in enumerate(compute) for instruction in order for part in instruction.parts]
    if not parts:
        raise ScheduleError(f"{path}: no computation in it; a cell looks like 0F0, 1B3 or (0F4;1B2)OVERLAP_F_B")
    ranks: dict[int, int] = {}
    for rank, part in parts:
        if ranks.setdefault(part.stage, rank) != rank:
            raise ScheduleError(f"{path}: stage {part.stage} is in row {ranks[part.stage] + 1} and in row {rank + 1}; "
                                "a stage lies on one rank")
    for stage in range(max(ranks)):
        if stage not in ranks:
            raise ScheduleError(f"{path}: stage {stage} is in no row, though stage {max(ranks)} is")
    for rank, order in enumerate(compute):
        if not order:
            raise ScheduleError(f"{path}: row {rank + 1} has no computation in it; every rank has a stage")
    placement = [[ranks[stage] for stage in range(len(ranks))]]
    micro_batches = 1 + max(part.micro_batch for _, part in parts)
    try:
        plan = Plan.from_compute(name or path.stem, placement, micro_batches, compute)
        verify(plan)
    except ScheduleError as error:
        raise ScheduleError(f"{path} is not a valid schedule: {error}") from error
    return plan


def _cell(instruction: Compute | Pair) -> str:
    if isinstance(instruction, Pair):
        return f"({_cell(instruction.forward)};{_cell(instruction.backward)})OVERLAP_F_B"
    return f"{instruction.stage}{instruction.kind}{instruction.micro_batch}"


def _instructions(cell: str, where: str) -> list[Compute | Pair]:
    """What a cell holds: one computation, or nothing."""
    cell = cell.strip()
    if not cell or _IMPLIED.fullmatch(cell):
        return []
    if single := _compute(cell):
        return [single]
    if match := _PAIR.fullmatch(cell):
        halves = [half for text in match.groups() if (half := _compute(text.strip()))]
        if len(halves) == 2:
            forward, backward = sorted(halves, key=lambda half: half.kind != "F")
            if forward.kind == "F" and backward.kind in "BI":
                return [Pair(forward, backward)]
        raise ScheduleError(f"{where}: {cell!r} must hold one forward and one backward (B or I)")
    raise ScheduleError(f"{where}: {cell!r} is no action; it looks like 0F0, 1I3, 1W3, 0B1 or (0F4;1B2)OVERLAP_F_B")


def _compute(cell: str) -> Compute | None:
    if match := _ACTION.fullmatch(cell):
        stage, kind, micro_batch = match.groups()
        return Compute(kind, 0, int(stage), int(micro_batch))  # type: ignore[arg-type]
    return None
