"""Which layers make up a stage, against DeepSpeed's own partition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import ConfigError
from megatron_ext.pipeline.partition import balanced, partition


def loads(weights: Sequence[float], bounds: Sequence[int]) -> list[float]:
    return [sum(weights[a:b]) for a, b in pairwise(bounds)]


def check_bounds(bounds: Sequence[int], layers: int, stages: int) -> None:
    assert (bounds[0], bounds[-1], len(bounds)) == (0, layers, stages + 1)
    assert all(b > a for a, b in pairwise(bounds)), "every stage has a layer"


@st.composite
def models(draw: st.DrawFn) -> tuple[list[float], int]:
    whole = st.one_of(st.just(0), st.integers(1, 3), st.integers(0, 10**9)).map(float)
    weights = draw(st.lists(st.one_of(whole, st.floats(0.01, 10)), min_size=2, max_size=9))
    return weights, draw(st.integers(1, len(weights)))


@given(models())
def test_the_heaviest_stage_is_as_light_as_can_be(model: tuple[list[float], int]) -> None:
    weights, stages = model
    bounds = balanced(weights, stages)
    check_bounds(bounds, len(weights), stages)
    ways = ((0, *cuts, len(weights)) for cuts in combinations(range(1, len(weights)), stages - 1))
    assert max(loads(weights, bounds)) == pytest.approx(min(max(loads(weights, way)) for way in ways))


@given(models())
def test_never_heavier_than_deepspeeds(model: tuple[list[float], int]) -> None:
    """DeepSpeed's search stops early now and then: 1, 4, 2, 2 in three stages become 5, 2, 2 instead of 1, 4, 4."""
    weights, stages = model
    found, theirs = balanced(weights, stages), partition_balanced(weights, stages)
    assert max(loads(weights, found)) <= max(loads(weights, theirs)) * (1 + 1e-9)


def test_what_the_heaviest_stage_leaves_open_is_spread_evenly() -> None:
    assert balanced([1] * 10, 4) == [0, 3, 6, 8, 10]  # not 3, 3, 3, 1
    assert balanced([100, 1, 1, 1, 1, 1, 1, 100], 4) == [0, 1, 4, 7, 8]
    assert balanced([2, 10, 5, 6], 3) == [0, 1, 2, 4]  # 2, 10, 11; the squares of 12, 5, 6 would be less


@given(st.integers(1, 40), st.integers(1, 40))
def test_uniform_is_deepspeeds(layers: int, stages: int) -> None:
    if stages <= layers:
        found = partition("uniform", [""] * layers, [0] * layers, stages)
        assert found == [int(i) for i in partition_uniform(layers, stages)]


def test_parameters() -> None:
    sizes = [100, 10, 10, 10, 10, 10, 100]
    assert partition("parameters", [""] * 7, sizes, 3) == [0, 1, 6, 7]
    assert partition("Parameters", [""] * 7, sizes, 2) == partition("parameters", [""] * 7, sizes, 2)


def test_type() -> None:
    names = ["Embedding", "DecoderLayer", "DecoderLayer", "Dropout", "DecoderLayer", "DecoderLayer", "Norm", "head"]
    for method in ("type:decoder", "TYPE:DecoderLayer", "type:^Deco.*r$"):
        bounds = partition(method, names, [10**6, 1, 1, 1, 1, 1, 1, 10**6], 2)
        assert loads([n == "DecoderLayer" for n in names], bounds) == [2, 2]
    # Every stage gets a layer, also where fewer match than there are stages.
    check_bounds(partition("type:norm|head", names, [0] * 8, 6), 8, 6)


@pytest.mark.parametrize("method, stages, text", [
    ("uniform", 4, "megatron_ext.pipeline.stages = 4: must not exceed the 3 layers of the model"),
    ("type:Conv", 2, "partition_method = 'type:Conv': matches none of the layers' types ['Linear', 'Norm']"),
    ("type:(", 2, "partition_method = 'type:(': is not a regular expression"),
    ("profile", 2, "partition_method = 'profile': must be 'uniform', 'parameters' or 'type:<regex>'"),
])
def test_refusals(method: str, stages: int, text: str) -> None:
    with pytest.raises(ConfigError) as found:
        partition(method, ["Linear", "Norm", "Linear"], [1, 1, 1], stages)
    assert str(found.value).startswith(text)
