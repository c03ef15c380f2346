"""When every computation of one step ran: planned by the simulator, or recorded by the executor.

Both have this one form, so that they can be drawn and compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.pipeline.instructions import Compute, Pair, ScheduleError


class Span(NamedTuple):
    """One computation, from `start` to `end` in the timeline's unit."""

    start: float
    end: float
    instruction: Compute | Pair


@dataclass(frozen=True)
class Timeline:
    """One step of all ranks.

    Attributes:
        name: shown above the picture.
        ranks: for each rank its spans, in order of time.
        chunks: stages of one direction on each rank; an activation of one of them counts 1 / chunks.
        unit: of the times; "s" for what ran, "" for what was simulated in units of the caller.
    """

    name: str
    ranks: list[list[Span]]
    chunks: int = 1
    unit: str = "s"

    @property
    def start(self) -> float:
        return min((spans[0].start for spans in self.ranks if spans), default=0.0)

    @property
    def end(self) -> float:
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)

    def idle(self, rank: int) -> float:
        """Time of the step in which a rank computes nothing."""
        return self.end - self.start - sum(span.end - span.start for span in self.ranks[rank])

    def activations(self, rank: int, sizes: Sequence[float] | None = None) -> list[tuple[float, float]]:
        """(time, activations held from then on); one is held from the start of its F to the end of its W or B.

        Args:
            rank: whose.
            sizes: of one micro-batch's activation in each stage (bytes, say); None counts in a rank's whole share of
                the model, of which every stage is 1 / chunks.
        """
        curve, held = [(self.start, 0.0)], 0.0
        scale = self.chunks if sizes is None else 1
        for start, end, instruction in self.ranks[rank]:  # one after the other, so their changes come in order
            grown = shrunk = 0.0
            for part in instruction.parts:
                if part.kind == "F":
                    grown += 1 if sizes is None else sizes[part.stage]
                elif part.kind in "WB":
                    shrunk += 1 if sizes is None else sizes[part.stage]
            for time, change in ((start, grown), (end, -shrunk)):
                if change:
                    held += change
                    if curve[-1][0] == time:
                        curve.pop()
                    curve.append((time, held / scale))
        return curve

    def peak_activations(self, rank: int, sizes: Sequence[float] | None = None) -> float:
        """The most that a rank holds at once; see `activations`."""
        held = most = 0.0
        for _, _, instruction in self.ranks[rank]:  # what one span frees is free before the next begins
            for part in instruction.parts:
                if part.kind == "F":
                    held += 1 if sizes is None else sizes[part.stage]
                    most = max(most, held)
            for part in instruction.parts:
                if part.kind in "WB":
                    held -= 1 if sizes is None else sizes[part.stage]
        return most / self.chunks if sizes is None else most

    def chunk_numbers(self) -> dict[tuple[int, int], int]:
        """(direction, stage) -> which of its rank's stages of that direction it is, counted along the direction."""
        numbers = {}
        for spans in self.ranks:
            seen = sorted({(part.direction, part.stage) for span in spans for part in span.instruction.parts})
            before: dict[int, int] = {}
            for direction, stage in seen:
                numbers[direction, stage] = before[direction] = before.get(direction, -1) + 1
        return numbers

    def grid(self, unit: float | None = None) -> str:
        """The timeline as text: a row per rank, five letters per `unit` of time (default: the shortest span)."""
        spans = [span for rank in self.ranks for span in rank]
        unit = unit or min((span.end - span.start for span in spans), default=1.0) or 1.0
        rows = []
        for rank, line in enumerate(self.ranks):
            row = ""
            for start, end, instruction in line:
                begin, stop = round(5 * (start - self.start) / unit), round(5 * (end - self.start) / unit)
                box = str(instruction)[: stop - begin - 1].ljust(stop - begin - 1, "-")
                row = row.ljust(begin) + box + "|"
            rows.append(f"{rank:3d}|{row}")
        return "\n".join(rows)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers: a span is [start, end, [kind, direction, stage, micro-batch]]."""
        ranks = [[[s.start, s.end, encode(s.instruction)] for s in spans] for spans in self.ranks]
        return {"name": self.name, "unit": self.unit, "chunks": self.chunks, "ranks": ranks}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        ranks = [[Span(start, end, decode(code)) for start, end, code in spans] for spans in data["ranks"]]
        return cls(data["name"], ranks, data["chunks"], data["unit"])

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """The timeline that `save` wrote.

        Raises:
            ScheduleError: the file holds something else.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ScheduleError(f"{path}: not a timeline ({type(error).__name__}: {error})") from error


def describe(instruction: Compute | Pair) -> str:
    """`F0.3@5`: a computation and its stage, which a plan with several stages on a rank needs."""
    return " & ".join(f"{part}@{part.stage}" for part in instruction.parts)


def encode(instruction: Compute | Pair) -> list[Any]:
    """[kind, direction, stage, micro-batch], or ["FB", forward, backward]: what JSON can hold."""
    if isinstance(instruction, Pair):
        return ["FB", encode(instruction.forward), encode(instruction.backward)]
    return [instruction.kind, instruction.direction, instruction.stage, instruction.micro_batch]


def decode(code: list[Any]) -> Compute | Pair:
    """The inverse of `encode`.

    Raises:
        ValueError: this is no computation.
    """
    if code[0] == "FB":
        _, forward, backward = code
        return Pair(_compute(forward), _compute(backward))
    return _compute(code)


def _compute(code: list[Any]) -> Compute:
    kind, *numbers = code
    if kind not in ("F", "I", "W", "B") or len(numbers) != 3 or not all(type(number) is int for number in numbers):
        raise ValueError(f"{code} is no computation: [F, I, W or B, direction, stage, micro-batch]")
    return Compute(kind, *numbers)
