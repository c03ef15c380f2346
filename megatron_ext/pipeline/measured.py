"""From what computations took to the `Times` that schedules are made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

from megatron_ext.pipeline.simulator import Times
from megatron_ext.pipeline.timeline import Span

Durations = dict[tuple[str, tuple[int, ...]], list[float]]
"""(kinds, stages) of a computation -> how long it took each time; a pair is ("FB" or "FI", (forward's, backward's)).
(IN_B, (stage,)) -> how long the weight gradients within a full backward took. Other kinds are ignored."""

IN_B = "W in B"

_ALIKE = 1.05  # stages that differ by less than this count as equal: medians are no better
_ROUNDS, _SETTLED = 1000, 1e-12  # of the fit of lengths: at most so many, and the change that ends it

_ByStage = dict[int, float]


def add_durations(seen: Durations, spans: Iterable[Span]) -> None:
    """Adds what some computations took."""
    for start, end, instruction in spans:
        parts = instruction.parts
        key = "".join(part.kind for part in parts), tuple(part.stage for part in parts)
        seen.setdefault(key, []).append(end - start)


def add_weight_grads(seen: Durations, times: Mapping[int, list[float]]) -> None:
    """Adds what weight gradients took within full backwards, alone ("B") or in a pair ("FB"): stage -> durations."""
    for stage, found in times.items():
        seen.setdefault((IN_B, (stage,)), []).extend(found)


def measured_times(seen: Durations, stages: int, chunks: int, message: float, paired: bool = True) -> Times:
    """Medians: for a rank's whole share of the model, and how unlike its stages are.

    What no schedule run so far has shown is filled in: where W never ran alone it is what it took within a B, and I is
    the rest of the B; if that is not known either, I and W are halves. A pair that never ran is the sum of its parts.

    Args:
        seen: of all ranks.
        stages: of the model, of which a rank has `chunks` per direction.
        message: from one rank to the next.
        paired: whether anything runs pairs together here; if not, a pair is the sum of its parts, whatever was seen,
            for else noise would decide for or against schedules with pairs.

    Raises:
        UserError: nothing took any time.
    """
    middle = {key: median(found) for key, found in seen.items() if found}
    alone = _alone(middle)
    lengths = _stage_lengths(alone, stages)
    whole = {kind: chunks * median(value / lengths[stage] for stage, value in found.items())
             for kind, found in alone.items() if found}
    forward, backward = whole.get("F", 0.0), whole.get("B", 0.0)
    if "I" not in whole and "W" not in whole:
        whole["I"] = whole["W"] = backward / 2
    input_grad = whole["I"] if "I" in whole else max(backward - whole["W"], 0.0)
    weight_grad = whole["W"] if "W" in whole else max(backward - input_grad, 0.0)
    pair = None
    gains = []
    for kind, part in (("FB", input_grad + weight_grad), ("FI", input_grad)):
        for (kinds, where), value in middle.items():
            if kinds == kind:
                one, other = (lengths[stage] for stage in where)
                # As `Times` has it: a pair of two stages gains the mean of what either gains with itself.
                gains.append((forward * one + part * other - chunks * value) / ((one + other) / 2))
    if paired and gains:
        pair = max(forward + input_grad + weight_grad - median(gains), weight_grad)
    uneven = max(lengths) / min(lengths) > _ALIKE
    return Times(forward, input_grad, weight_grad, pair, message, tuple(lengths) if uneven else None)


def _alone(middle: Mapping[tuple[str, tuple[int, ...]], float]) -> dict[str, _ByStage]:
    """Kind -> stage -> what it takes there; where two of I, W and B = I + W are known, so is the third."""
    alone: dict[str, _ByStage] = {kind: {} for kind in "FIWB"}
    for (kind, where), value in middle.items():
        if kind in alone:
            alone[kind][where[0]] = value
    input_grad, weight_grad, full = alone["I"], alone["W"], alone["B"]
    for (kind, where), value in middle.items():
        if kind == IN_B:
            weight_grad.setdefault(where[0], value)
    for stage in sorted(input_grad.keys() | weight_grad.keys() | full.keys()):
        match stage in input_grad, stage in weight_grad, stage in full:
            case True, True, False:
                full[stage] = input_grad[stage] + weight_grad[stage]
            case True, False, True:
                weight_grad[stage] = max(full[stage] - input_grad[stage], 0.0)
            case False, True, True:
                input_grad[stage] = max(full[stage] - weight_grad[stage], 0.0)
    return alone


def _stage_lengths(alone: Mapping[str, _ByStage], stages: int) -> list[float]:
    """How much longer than the mean each stage takes, which is 1; also for a stage on which nothing ran alone.

    Fits duration = whole[kind] x length[stage] to the kinds and stages there are, one side after the other. Not every
    kind need be known on every stage: a kind is compared with the lengths of its own stages. Both sides are ratios of
    sums, so that a kind counts as much as it takes, and a W of microseconds, or none at all, not.
    """
    # Of a stage where nothing took any time nothing can be said.
    total = {stage: sum(found.get(stage, 0.0) for found in alone.values()) for stage in range(stages)}
    lengths = {stage: 1.0 for stage in range(stages) if total[stage] > 0}
    for _ in range(_ROUNDS if lengths else 0):
        expected = dict.fromkeys(lengths, 0.0)
        for found in alone.values():
            here = [stage for stage in found if stage in lengths]
            whole = sum(found[stage] for stage in here) / (sum(lengths[stage] for stage in here) or 1.0)
            for stage in here:
                expected[stage] += whole
        after = {stage: total[stage] / expected[stage] for stage in lengths}
        change = max(abs(after[stage] / lengths[stage] - 1) for stage in lengths)
        lengths = after
        if change < _SETTLED:
            break
    mean = sum(lengths.values()) / max(len(lengths), 1)
    return [lengths[stage] / mean if stage in lengths else 1.0 for stage in range(stages)]
