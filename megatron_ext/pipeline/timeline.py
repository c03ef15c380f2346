"""When every computation of one step ran: planned by the simulator, or recorded by the executor.

Both have this one form, so that they can be drawn and compared with each other.
"""

from __future__ import annotations

import json
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

    def activations(self, rank: int) -> list[tuple[float, float]]:
        """(time, activations held from then on); one is held from the start of its F to the end of its W or B."""
        changes = []
        for start, end, instruction in self.ranks[rank]:
            for part in instruction.parts:
                if part.kind == "F":
                    changes.append((start, 1))
                elif part.kind in "WB":
                    changes.append((end, -1))
        curve, held = [(self.start, 0.0)], 0
        for time, change in sorted(changes):
            held += change
            if curve[-1][0] == time:
                curve.pop()
            curve.append((time, held / self.chunks))
        return curve

    def peak_activations(self, rank: int) -> float:
        return max(held for _, held in self.activations(rank))

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
        ranks = [[[s.start, s.end, _encode(s.instruction)] for s in spans] for spans in self.ranks]
        return {"name": self.name, "unit": self.unit, "chunks": self.chunks, "ranks": ranks}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        ranks = [[Span(start, end, _decode(code)) for start, end, code in spans] for spans in data["ranks"]]
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


def _encode(instruction: Compute | Pair) -> list[Any]:
    if isinstance(instruction, Pair):
        return ["FB", _encode(instruction.forward), _encode(instruction.backward)]
    return [instruction.kind, instruction.direction, instruction.stage, instruction.micro_batch]


def _decode(code: list[Any]) -> Compute | Pair:
    if code[0] == "FB":
        return Pair(Compute(*code[1]), Compute(*code[2]))
    return Compute(*code)
