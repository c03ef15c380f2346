"""Which of a checkpoint's tensors are converted: its weights, their FP32 masters or their average; with what state.

A training checkpoint holds each weight up to five times: as the model computed with it, as the FP32 master, with two
moments, and averaged. An inference format has one place for it. Which one is meant and that the others may go is for
the user to say, never for us to guess.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_ext.checkpoint.convert import names
from megatron_ext.checkpoint.convert.source import CARRIED, Source, assemble
from megatron_ext.checkpoint.convert.tensors import Part, Stored
from megatron_ext.config.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_ext.checkpoint.convert.formats import Format

WEIGHTS = {"model": None, "master": "fp32", "ema": "ema"}
"""What can be converted as the weights -> the state it is of."""
OPTIMIZER = ("keep", "carry", "drop")


def choose(source: Source, format: Format, optimizer: str | None, weights: str) -> tuple[Source, frozenset[str]]:
    """Chooses tensors for a conversion.

    Args:
        source: all that there is.
        format: what is to be written.
        optimizer: of `OPTIMIZER`, or None.
        weights: key of `WEIGHTS`.

    Returns:
        The source as if it held nothing else; and the kinds of state that are written beside the result.

    Raises:
        CheckpointError: the source has not what is asked for, or has more than the format, and nothing was said of it.
    """
    if optimizer is not None and optimizer not in OPTIMIZER:
        raise CheckpointError("--optimizer", f"is {optimizer!r}", f"must be one of {', '.join(OPTIMIZER)}")
    if weights not in WEIGHTS:
        raise CheckpointError("--weights", f"is {weights!r}", f"must be one of {', '.join(WEIGHTS)}")
    state = WEIGHTS[weights]
    if source.reading.unread and optimizer != "drop":
        raise CheckpointError(source.folder.path, f"holds {source.reading.unread}", "it cannot be read",
                              "leave it out with --optimizer drop")
    if state is not None and state not in source.states:
        held = f"it holds {', '.join(sorted(source.states))}" if source.states else "it holds weights only"
        raise CheckpointError(source.folder.path, f"holds no {state} of its weights", f"--weights is {weights!r}", held)
    if weights == "ema" and optimizer not in (None, "drop"):
        raise CheckpointError("--optimizer", f"is {optimizer!r}, beside --weights ema",
                              "moments belong to the weights as they were trained")
    keep = optimizer in ("keep", "carry") or (optimizer is None and state is None)
    if state is not None or not keep:
        source = _select(source, state, keep)
    apart = source.states - format.states
    if apart and optimizer != "carry":
        kinds = ", ".join(name for name in names.STATES if name in apart)
        raise CheckpointError(source.folder.path, f"holds optimizer state ({kinds})",
                              f"{format.title} has no place for it",
                              "leave it out with --optimizer drop, or have it beside with --optimizer carry")
    return source, apart


def _select(source: Source, state: str | None, keep: bool) -> Source:
    """A source in which one kind of state (if any) takes the place of the weights, with or without the others."""
    if not source.states:
        return source
    split = [names.split_state(name) for name in source.origins]
    replaced = set() if state is None else {base for base, kind in split if kind == state}
    # A copy (of the embedding, for multi-token prediction) repeats what takes the original's place.
    table = source.model.table
    copies = {base for base, kind in split if kind is None and base in table and base not in replaced
              and table[base].row.alias in replaced}
    stored = [kept for each in source.stored if (kept := _chosen(each, state, replaced | copies, keep)) is not None]
    beside = [each for each in stored if each.file.split("/")[0] == CARRIED]
    aliases = [*source.facts.get("aliases", source.reading.aliases), *sorted(copies)]
    facts = {**source.facts, "aliases": aliases} if copies else source.facts
    reading = replace(source.reading, stored=[each for each in stored if each.file.split("/")[0] != CARRIED])
    return assemble(source.folder, source.format, reading, beside, facts, source.digests)


def _chosen(stored: Stored, state: str | None, replaced: set[str], keep: bool) -> Stored | None:
    """A stored tensor with the parts that are chosen; None if there are none."""
    parts: list[Part] = []
    for part in stored.parts:
        base, kind = names.split_state(part.canonical)
        if kind is None and (names.weight_of(base) or base) not in replaced:
            parts.append(part)
        elif kind is not None and kind == state:
            parts.append(part._replace(canonical=base))
        elif kind is not None and keep:
            parts.append(part)
    if len(parts) == len(stored.parts):
        return stored._replace(parts=tuple(parts))
    return stored._replace(parts=tuple(parts), padded=True) if parts else None
