"""Timelines and plans as files: what was planned or what ran, in the trace format that chrome://tracing and
ui.perfetto.dev open.

A trace is one JSON object: `traceEvents`, one thread per rank, a complete event ("X") per computation with direction,
stage and micro-batch as its arguments and a counter ("C") of the activations held; and `otherData`, from which the
timeline comes back. A run leaves a folder per recorded step, each rank its own file, and the plan once:

    <folder>/step_000012/plan.json
    <folder>/step_000012/rank_00000.json, rank_00001.json, ...       rank of the pipeline
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.pipeline.instructions import Compute, Instruction, Message, Pair, Plan, ScheduleError, Transfer
from megatron_ext.pipeline.timeline import Span, Timeline, decode, describe, encode
from megatron_ext.pipeline.verifier import verify

_FORMAT, _PLAN_FORMAT = "megatron_ext timeline 1", "megatron_ext plan 1"
_MICROSECONDS = {"s": 1e6, "": 1e3}  # of a timeline's unit; what was simulated has none, and is shown as milliseconds
_PROCESS = 1  # process and thread 0 mean "idle" to Perfetto


def write_trace(path: str | Path, timeline: Timeline, plan: Plan) -> Path:
    """Writes one file of all ranks: `simulate(plan).timeline`, or a run that was read with `read_trace`."""
    ranks = dict(enumerate(timeline.ranks))
    return _write(Path(path), _trace(timeline.name, ranks, plan, timeline.unit, {}))


def write_rank_trace(folder: str | Path, step: int, rank: int, spans: Sequence[Span], plan: Plan,
                     clock_offset: float = 0.0, unit: str = "s", more: Mapping[str, Any] | None = None) -> Path:
    """Writes what one rank ran in one step; rank 0 also writes the plan.

    Args:
        folder: of all recorded steps, the same for all ranks.
        step: number of the step; a step recorded again replaces the former.
        rank: in the pipeline, 0 .. P-1.
        spans: in order of time.
        plan: what was run.
        clock_offset: added to all times, so that the clocks of ranks on several hosts agree.
        unit: of the times: "s", or "" where they mean nothing.
        more: what else is to be said of the step, for `otherData`: "expert_traffic", say.

    Returns:
        The path of the rank's file.
    """
    place = Path(folder) / f"step_{step:06d}"
    shifted = [span._replace(start=span.start + clock_offset, end=span.end + clock_offset) for span in spans]
    if rank == 0:
        write_plan(place / "plan.json", plan)
    trace = _trace(f"{plan.name}, step {step}", {rank: shifted}, plan, unit, {"step": step, **(more or {})})
    return _write(place / f"rank_{rank:05d}.json", trace)


def read_trace(path: str | Path, step: int | None = None) -> Timeline:
    """The timeline in a file of `write_trace`, in the folder of one step, or in a folder of steps.

    Args:
        path: one of the three; of a run with several replicas, which have a folder each, the first is read.
        step: which, in a folder of steps; None takes the last that is whole.

    Raises:
        ScheduleError: there is none, it is damaged, or ranks are missing.
    """
    path = Path(path)
    if path.is_dir():
        return _merge(_step_folder(path, step))
    name, unit, chunks, ranks = _read_ranks(path)
    if sorted(ranks) != list(range(len(ranks))):
        raise ScheduleError(f"{path}: holds rank {', '.join(map(str, ranks))} alone; give the folder it lies in")
    return Timeline(name, [ranks[rank] for rank in range(len(ranks))], chunks, unit)


def recorded_steps(folder: str | Path) -> list[int]:
    """The steps of which anything was recorded in a folder, in order."""
    return sorted(int(path.name[5:]) for path in Path(folder).glob("step_*") if path.name[5:].isdigit())


def write_plan(path: str | Path, plan: Plan) -> Path:
    """Writes a plan with its sends, receives and promises."""
    instructions = [[_encode(instruction) for instruction in order] for order in plan.instructions]
    fields = {"name": plan.name, "stages": plan.stages, "micro_batches": plan.micro_batches,
              "placement": plan.placement, "activation_limit": plan.activation_limit,
              "weight_grad_limit": plan.weight_grad_limit}
    return _write(Path(path), {"format": _PLAN_FORMAT, **fields, "instructions": instructions})


def read_plan(path: str | Path, step: int | None = None) -> Plan:
    """The plan in a file of `write_plan`, or that of a recorded step (folders as in `read_trace`), verified.

    Raises:
        ScheduleError: there is none, it is damaged, or it cannot run.
    """
    path = Path(path)
    if path.is_dir():
        path = _step_folder(path, step) / "plan.json"
    data = _read(path)
    if data.get("format") != _PLAN_FORMAT:
        raise ScheduleError(f"{path}: not a plan (its format is {data.get('format')!r}, not {_PLAN_FORMAT!r})")
    try:
        placement = [[int(rank) for rank in place] for place in data["placement"]]
        instructions = [[_decode(code, placement) for code in order] for order in data["instructions"]]
        plan = Plan(str(data["name"]), int(data["stages"]), int(data["micro_batches"]), placement, instructions,
                    data["activation_limit"], data["weight_grad_limit"])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ScheduleError(f"{path}: a damaged plan ({type(error).__name__}: {error})") from error
    verify(plan)
    return plan


# -- traces


def _trace(name: str, ranks: Mapping[int, Sequence[Span]], plan: Plan, unit: str, more: dict[str, Any],
           ) -> dict[str, Any]:
    scale = _MICROSECONDS[unit]
    events: list[dict[str, Any]] = [_named("process_name", 0, name)]
    for rank, spans in ranks.items():
        events.append(_named("thread_name", rank + 1, f"rank {rank}"))
        events.append({"ph": "M", "name": "thread_sort_index", "pid": _PROCESS, "tid": rank + 1,
                       "args": {"sort_index": rank}})
        for start, end, instruction in spans:
            events.append({"ph": "X", "name": _name(instruction, plan.chunks), "cat": instruction.kind,
                           "pid": _PROCESS, "tid": rank + 1, "ts": start * scale, "dur": (end - start) * scale,
                           "args": _arguments(instruction)})
        curve = Timeline(name, [list(spans)], plan.chunks).activations(0) if spans else []
        events += ({"ph": "C", "name": f"activations held, rank {rank}", "pid": _PROCESS, "tid": rank + 1,
                    "ts": time * scale, "args": {"held": held}} for time, held in curve)
    about = {"format": _FORMAT, "name": name, "unit": unit, "ranks": list(ranks), "plan": plan.name,
             "stages": plan.stages, "micro_batches": plan.micro_batches, "chunks": plan.chunks,
             "placement": plan.placement, **more}
    return {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def _name(instruction: Compute | Pair, chunks: int) -> str:
    return str(instruction) if chunks == 1 else describe(instruction)


def _arguments(instruction: Compute | Pair) -> dict[str, Any]:
    if isinstance(instruction, Pair):
        return {"forward": _arguments(instruction.forward), "backward": _arguments(instruction.backward)}
    return {"kind": instruction.kind, "direction": instruction.direction, "stage": instruction.stage,
            "micro_batch": instruction.micro_batch}


def _instruction(arguments: Mapping[str, Any]) -> Compute | Pair:
    def code(half: Mapping[str, Any]) -> list[Any]:
        return [half[key] for key in ("kind", "direction", "stage", "micro_batch")]

    if "forward" in arguments:
        return decode(["FB", code(arguments["forward"]), code(arguments["backward"])])
    return decode(code(arguments))


def _read_ranks(path: Path) -> tuple[str, str, int, dict[int, list[Span]]]:
    """Name, unit, chunks, and the spans of every rank in a file."""
    data = _read(path)
    about = data.get("otherData")
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ScheduleError(f"{path}: not a trace of ours; those have otherData.format = {_FORMAT!r}")
    try:
        scale = _MICROSECONDS[about["unit"]]
        ranks: dict[int, list[Span]] = {rank: [] for rank in about["ranks"]}
        for event in data["traceEvents"]:
            if event["ph"] == "X":
                start, length = event["ts"] / scale, event["dur"] / scale
                ranks[event["tid"] - 1].append(Span(start, start + length, _instruction(event["args"])))
        return str(about["name"]), about["unit"], int(about["chunks"]), ranks
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ScheduleError(f"{path}: a damaged trace ({type(error).__name__}: {error})") from error


def _step_folder(path: Path, step: int | None) -> Path:
    if (path / "plan.json").exists() or any(path.glob("rank_*.json")):
        return path
    steps = recorded_steps(path)
    if not steps and (replicas := sorted(path.glob("replica_*"), key=lambda folder: (len(folder.name), folder.name))):
        return _step_folder(replicas[0], step)
    if not steps:
        rule = "no recorded step in it"
        raise ScheduleError(f'{path}: {rule}; a run writes them with "pipeline": {{"trace": "{path}"}} in its config')
    if step is None:
        whole = [s for s in steps if not _missing(path / f"step_{s:06d}")]
        return path / f"step_{(whole or steps)[-1]:06d}"
    if step not in steps:
        near = min(steps, key=lambda s: abs(s - step))
        raise ScheduleError(f"{path}: step {step} was not recorded; the nearest that was is {near}")
    return path / f"step_{step:06d}"


def _missing(folder: Path) -> list[int]:
    """Ranks of a recorded step without a file; [-1] if not even the plan is there."""
    try:
        stages = int(_read(folder / "plan.json")["stages"])
    except (ScheduleError, ValueError, TypeError, KeyError):
        return [-1]
    return [rank for rank in range(stages) if not (folder / f"rank_{rank:05d}.json").exists()]


def _merge(folder: Path) -> Timeline:
    missing = _missing(folder)
    if missing == [-1]:
        raise ScheduleError(f"{folder}: its plan.json, which rank 0 writes, is missing or damaged")
    if missing:
        ranks = ", ".join(map(str, missing))
        raise ScheduleError(f"{folder}: the files of rank {ranks} are missing; bring the files of all hosts together, "
                            "or take another step if the run stopped in this one")
    spans: list[list[Span]] = []
    for rank in range(int(_read(folder / "plan.json")["stages"])):
        path = folder / f"rank_{rank:05d}.json"
        name, unit, chunks, found = _read_ranks(path)
        if list(found) != [rank]:
            raise ScheduleError(f"{path}: holds rank {', '.join(map(str, found))}, not {rank}")
        spans.append(found[rank])
    return Timeline(name, spans, chunks, unit)


# -- plans


def _encode(instruction: Instruction) -> list[Any]:
    if isinstance(instruction, Transfer):
        return [instruction.kind, instruction.direction, instruction.stage, instruction.micro_batch]
    return encode(instruction)


def _decode(code: list[Any], placement: list[list[int]]) -> Instruction:
    """Source and destination of a message follow from the placement."""
    if code[0] not in ("SF", "RF", "SB", "RB"):
        return decode(code)
    kind, direction, stage, micro_batch = code
    target = stage + 1 if kind[1] == "F" else stage - 1
    if target < 0:
        raise ValueError(f"{code}: stage {stage} sends nothing there")
    ranks = placement[direction]
    return Transfer(kind, Message(kind[1], direction, stage, micro_batch, ranks[stage], ranks[target]))


# -- files


def _write(path: Path, data: dict[str, Any]) -> Path:
    """Whole or not at all: a reader may come while a run goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(data, separators=(",", ":")))
    unfinished.replace(path)
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ScheduleError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ScheduleError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ScheduleError(f"{path}: must hold one JSON object")
    return data
