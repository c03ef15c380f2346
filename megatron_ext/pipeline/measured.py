"""From what computations took to the `Times` that schedules are made for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

from megatron_ext.pipeline.simulator import Times
from megatron_ext.pipeline.timeline import Span

Durations = dict[tuple[str, tuple[int, ...]], list[float]]
"""(kinds, stages) of a computation -> how long it took each time; a pair is ("FB" or "FI", (forward's, backward's))."""

_ALIKE = 1.05  # stages that differ by less than this count as equal: medians are no better


def add_durations(seen: Durations, spans: Iterable[Span]) -> None:
    """Adds what some computations took; `seen` makes its lists itself (a defaultdict)."""
    for start, end, instruction in spans:
        parts = instruction.parts
        seen["".join(part.kind for part in parts), tuple(part.stage for part in parts)].append(end - start)


def measured_times(seen: Durations, stages: int, chunks: int, message: float) -> Times:
    """Medians: for a rank's whole share of the model, and how unlike its stages are.

    What no schedule run so far has shown is filled in: I and W are halves of a B that was never split, and a pair that
    never ran takes as long as its parts.

    Args:
        seen: of all ranks.
        stages: of the model, of which a rank has `chunks` per direction.
        message: from one rank to the next.
    """
    middle: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for (kinds, where), found in seen.items():
        middle[kinds][where] = median(found)
    lengths = _stage_lengths(middle, stages)
    whole = {kind: chunks * median(value / lengths[stages[0]] for stages, value in middle[kind].items())
             for kind in "FIWB" if kind in middle}
    forward = whole.get("F", 0.0)
    input_grad = whole.get("I", whole.get("B", 0.0) / 2)
    weight_grad = whole.get("W", max(whole.get("B", 0.0) - input_grad, 0.0))
    shares = []  # of a full pair in what its halves take apart; to one with an I its W is added
    for kind, added in (("FB", 0.0), ("FI", weight_grad)):
        for (one, other), value in middle.get(kind, {}).items():
            apart = forward * lengths[one] + (input_grad + weight_grad) * lengths[other]
            shares.append((value * chunks + added * lengths[other]) / apart if apart else 1.0)
    pair = max(median(shares) * (forward + input_grad + weight_grad), weight_grad) if shares else None
    uneven = min(lengths) > 0 and max(lengths) / min(lengths) > _ALIKE
    return Times(forward, input_grad, weight_grad, pair, message, tuple(lengths) if uneven else None)


def _stage_lengths(middle: Mapping[str, Mapping[tuple[int, ...], float]], stages: int) -> list[float]:
    """How much longer than the mean each stage takes, over the kinds that ran alone on it; 1 where none did."""
    ratios: list[list[float]] = [[] for _ in range(stages)]
    for kind in "FIWB":
        alone = middle.get(kind, {})
        mean = sum(alone.values()) / len(alone) if alone else 0.0
        for (stage,), value in alone.items():
            if mean > 0:
                ratios[stage].append(value / mean)
    lengths = [sum(found) / len(found) if found else 1.0 for found in ratios]
    mean = sum(lengths) / stages
    return [length / mean for length in lengths]
