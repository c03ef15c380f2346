"""The options that say how long computations take, as `Times`; what is wrong with one is said by the option's name."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline.phases import Phases
from megatron_ext.pipeline.simulator import Times

_REPLACED = (1.0, 1.0, 1.0, None)  # defaults of the options whose place --phases takes


def read_times(forward: float, input_grad: float, weight_grad: float, pair: float | None, message: float,
               phases: Path | None, stage_lengths: str | None) -> Times:
    """Durations from the options of the same names.

    Raises:
        ConfigError: one that cannot be; its key is the option.
    """
    if phases is not None and (forward, input_grad, weight_grad, pair) != _REPLACED:
        raise ConfigError("--phases", str(phases), "F, I, W and the pair follow from the phases",
                          "leave out --forward, --input-grad, --weight-grad and --pair")
    lengths = None if stage_lengths is None else _lengths(stage_lengths)
    try:
        if phases is None:
            return Times(forward, input_grad, weight_grad, pair, message, lengths)
        return replace(read_phases(phases).times(message), stages=lengths)
    except ConfigError as error:
        if error.key.startswith("--"):
            raise
        raise ConfigError("--" + error.key.replace("_", "-"), error.value, error.rule, error.hint) from None


def read_phases(path: Path) -> Phases:
    """The phases in a file: {"attention": [F, I, W], "dispatch": D, "mlp": [F, I, W], "combine": C, "blocks": n}; a
    number instead of [F, I, W] is all three, `blocks` may be left out.

    Raises:
        ConfigError: the file cannot be read, lacks a phase or has another, or one is no duration.
    """
    try:
        given: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("--phases", str(path), f"cannot be read as JSON: {error}") from error
    needed = {"attention", "dispatch", "mlp", "combine"}
    if not isinstance(given, dict) or not needed <= given.keys() <= needed | {"blocks"}:
        found = ", ".join(given) or "nothing" if isinstance(given, dict) else type(given).__name__
        raise ConfigError("--phases", str(path), "must hold attention, dispatch, mlp, combine, and may hold blocks",
                          f"it holds {found}")
    fields: dict[str, Any] = {}
    for name in sorted(needed):
        value, one = given[name], name in ("dispatch", "combine")
        numbers = value if isinstance(value, list) else [value] if one else [value] * 3
        if len(numbers) != (1 if one else 3) or not all(_is_number(number) and 0 <= number < inf for number in numbers):
            rule = "one number, forward and backward alike" if one else "[F, I, W], or one number for all three"
            raise ConfigError(f"--phases {name}", value, f"{rule}; finite and not negative")
        fields |= zip((name, f"{name}_input_grad", f"{name}_weight_grad"), map(float, numbers), strict=False)
    blocks = given.get("blocks", 1)
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ConfigError("--phases blocks", blocks, "a rank has a whole number of blocks, at least 1")
    return Phases(**fields, blocks=blocks)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lengths(text: str) -> tuple[float, ...]:
    try:
        lengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or not all(0 < length < inf for length in lengths):
        raise ConfigError("--stage-lengths", text, "lengths above 0 with commas between them, such as 1,1,1,1.4")
    return lengths
