"""Lists of phases that cannot be run are refused with the layer, the phase and the rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.phases import Phase, check_phases, results, whole
from tests.pipeline.fake_layers import Gather, Log, Scatter


def phase(reads: Any, writes: Any, name: str = "mlp") -> Phase:
    return Phase(name, reads, writes, lambda _, *values: values[0])


GOOD = [phase(("x",), ("h", "g")), phase(("h",), ("y",)), phase(("y", "g", "x"), ("x",))]


def test_what_can_be_run() -> None:
    check_phases(GOOD, "layer")
    check_phases([phase(("x",), ("x",))], "layer")


TOKENS = Scatter.reads[0]
SCATTER, GATHER = Scatter(Log(), 2), Gather(Log(), 2)


def again(exchange: Any) -> Any:
    """The same communication once more, under another name."""
    other = copy.copy(exchange)
    other.writes = (("more",),)
    return other


@pytest.mark.parametrize("phases, text", [
    (None, "must be a list of Phase and Exchange"), ([], "at least one"), (iter(GOOD), "must be a list"),
    ([phase(("x",), ("h",)), phase(("h",), ("y",))], r"phase 1, 'mlp', must have \"x\" among them"),
    ([phase(("hh",), ("x",))], r"'hh': in phase 0, 'mlp', is read, and no phase before writes it \(x are there\)"),
    ([phase("x", ("x",))], "'x': in phase 0, 'mlp', must be a tuple of names"),
    ([phase(("x",), ()), phase(("x",), ("x",))], "must write something"),
    ([phase(("x",), ("h",)), phase(("x",), ("h",)), phase(("h",), ("x",))], "'h': in phase 1, .* a second time"),
    ([phase(("x",), ("x",)), phase(("x",), ("x",))], "'x': in phase 0, .* before the last phase"),
    ([phase(("x",), TOKENS), SCATTER, phase(("rows.0",), ("x",))], r"'rows.1', .*in phase 1, 'scatter', is a group"),
    ([phase(("x",), TOKENS), SCATTER, phase(("rows.0", "rows.1"), ("results.0", "results.1")), GATHER, again(GATHER),
      phase(("mixed", "more"), ("x",))], "'results.0': in phase 4, 'gather', is kept for backward by an exchange"),
], ids=str)
def test_what_cannot(phases: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        check_phases(phases, "layers[3] (Mine)")
    assert str(error.value).startswith("layers[3] (Mine).phases() = ")


@pytest.mark.parametrize("output, found", [
    (torch.zeros(2, 8), "Tensor"), ((1, 2, 3), "3 results"), (None, "NoneType"), ([1, 2], "list")])
def test_a_phase_returns_as_many_as_it_writes(output: Any, found: str) -> None:
    """A tensor must not be taken apart along its first dimension."""
    two = Phase("attention", ("x",), ("h", "g"), lambda *_: output)
    with pytest.raises(ConfigError, match=f"phase 'attention' = '{found}': must return a tuple of 2: h, g"):
        results(two, output)
    with pytest.raises(ConfigError, match="attention"):
        whole([two, phase(("h",), ("x",))], torch.zeros(2, 8))
