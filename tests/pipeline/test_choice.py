"""The choice follows the times: what is picked in regimes that differ, why, and what is said when nothing fits."""

from __future__ import annotations

import pytest

from megatron_ext.config import ConfigError
from megatron_ext.pipeline import Times, schedule, simulate
from megatron_ext.pipeline.choice import ALIKE, PLACEMENTS, choose, in_the_config, start
from megatron_ext.pipeline.measured import measured_times
from megatron_ext.pipeline.schedules import NAMES, placement_of
from megatron_ext.pipeline.verifier import verify

NO_GAIN, EP_BOUND = Times(20, 20, 20, message=1), Times(20, 20, 10, pair=32, message=1)
P, M = 4, 8

PICKS = [
    # placement, chunks, times, memory limit -> what has the shortest step, or holds less and is as good
    ("ring", 2, NO_GAIN, 5.5, "interleaved"),
    ("ring", 1, NO_GAIN, None, "zb_h1"), ("ring", 1, EP_BOUND, None, "wave"), ("ring", 1, NO_GAIN, 3, "wave"),
    ("ring", 2, NO_GAIN, None, "interleaved"), ("ring", 2, EP_BOUND, None, "interleaved_paired"),
    ("wave", 2, EP_BOUND, None, "wave"), ("wave", 2, NO_GAIN, 3, "wave"),
    ("bidirectional", 1, EP_BOUND, None, "dualpipe_interleaved"),
    ("bidirectional", 2, EP_BOUND, 3, "dualpipe_interleaved"),
]


@pytest.mark.parametrize(("kind", "chunks", "times", "limit", "pick"), PICKS)
def test_the_pick_is_the_shortest_that_fits(kind, chunks, times, limit, pick):
    placement = PLACEMENTS[kind](P, chunks)
    choice = choose(times, P, M, placement, chunks, limit)
    assert choice.name == pick
    plan = schedule(choice.name, P, M, choice.times, chunks, limit)
    assert plan.placement == placement
    mine = simulate(plan, times)
    assert limit is None or max(mine.peak_activations) <= limit
    for name in NAMES:  # all there are, made here once more
        try:
            if placement_of(name, P, chunks) == placement:
                rival = simulate(schedule(name, P, M, times, chunks, limit), times)
                if limit is None and max(rival.peak_activations) > max(P + 1, *verify(
                        start(P, M, placement, chunks, None)).activations):
                    continue  # nobody asked for so much memory
                assert mine.makespan <= (1 + ALIKE) * rival.makespan, name
        except ConfigError:
            continue
    assert f"{pick} " in choice.why


def test_of_equally_long_schedules_the_one_that_holds_least():
    choice = choose(NO_GAIN, 8, 16, PLACEMENTS["wave"](8, 2), 2)
    lengths = {c.name: (c.makespan, c.peak) for c in choice.candidates if c.built}
    assert lengths["wave"] < lengths["zbv"] and lengths["zbv"][1] < lengths["wave"][1]
    assert choice.name == "zbv" and "holds least" in choice.why
    equal = choose(Times(20, 20, 20, pair=48), 4, 16, PLACEMENTS["bidirectional"](4), 1)
    lengths = {c.name: (c.makespan, c.peak) for c in equal.candidates if c.built}
    assert lengths["dualpipe_interleaved"] < lengths["dualpipe_zb"] < (1.01 * lengths["dualpipe_interleaved"][0], 5.1)
    assert equal.name == "dualpipe_interleaved" and "shortest" in equal.why, "who holds as much has to be shorter"


def test_nobody_is_given_more_memory_than_he_would_expect():
    """With W = 0 and slow messages GPipe is the shortest, at m activations: only a limit that allows it chooses it."""
    times, ring = Times(1, 1, 0, message=0.3), PLACEMENTS["ring"](P)
    choice = choose(times, P, 32, ring, 1)
    assert choice.name != "gpipe"
    [gpipe] = [c for c in choice.candidates if c.name == "gpipe"]
    assert gpipe.makespan is None and gpipe.reason == "holds 32 activations; set memory_limit to allow more than 5"
    assert choose(times, P, 32, ring, 1, memory_limit=32).name == "gpipe"


def test_a_better_placement_is_named_for_the_next_start():
    choice = choose(EP_BOUND, P, M, PLACEMENTS["ring"](P), 1)
    assert choice.elsewhere is not None and choice.elsewhere.name == "dualpipe_interleaved"
    assert f"schedule 'dualpipe_interleaved' and chunks {choice.elsewhere.chunks} would be" in choice.why
    few = choose(EP_BOUND, P, M, PLACEMENTS["ring"](P), 1, layers=P)
    assert few.elsewhere is None or few.elsewhere.chunks == 1, "a model of P layers has no more than P stages"
    assert choose(NO_GAIN, P, M, PLACEMENTS["bidirectional"](P), 1).elsewhere is None, "what gains 1 % is not named"


def test_what_a_choice_starts_on_is_safe_and_shows_pairs():
    for kind, chunks, limit, name in (("bidirectional", 1, None, "dualpipe"),
                                      ("bidirectional", 2, None, "dualpipe_interleaved"),
                                      ("bidirectional", 1, 3, "dualpipe_interleaved"), ("ring", 1, None, "wave"),
                                      ("ring", 2, None, "interleaved_paired"), ("wave", 2, None, "dualpipev"),
                                      ("wave", 4, None, "wave")):
        assert start(P, M, PLACEMENTS[kind](P, chunks), chunks, limit).name == name
    with pytest.raises(ConfigError, match=r"memory_limit = 0\.2"):
        start(P, M, PLACEMENTS["ring"](P), 1, 0.2)
    with pytest.raises(ConfigError, match=r"placement on 4 ranks holds so few activations; allow 1 \(wave\)"):
        choose(NO_GAIN, P, M, PLACEMENTS["ring"](P), 1, 0.2)
    with pytest.raises(ConfigError, match=r"allow 5\.5 \(interleaved\)"):
        start(P, M, PLACEMENTS["ring"](P, 2), 2, 3)


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_there_is_a_start_whenever_there_is_a_choice(kind, chunks):
    placement = PLACEMENTS[kind](P, chunks)
    for limit in (0.5, 1, 2, 4, 5.5, None):
        try:
            first = start(P, M, placement, chunks, limit)
        except ConfigError as error:
            assert limit is not None and error.key == "pipeline.memory_limit"
            assert not any(fits(name, placement, chunks, limit) for name in NAMES)
            continue
        assert first.placement == placement and (limit is None or max(verify(first).activations) <= limit)
        if limit == 5.5:
            choose(EP_BOUND, P, M, placement, chunks, limit)


def fits(name, placement, chunks, limit):
    try:
        return placement_of(name, P, chunks) == placement and bool(schedule(name, P, M, None, chunks, limit))
    except ConfigError:
        return False


def test_errors_speak_of_the_config():
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps = 3: makes 6 micro-batches in 2 directions, "
                                          r"and chimera .* multiple of 4; try 4 or 8 micro-batches"), in_the_config(2):
        schedule("chimera", 4, 6)
    with pytest.raises(ConfigError, match=r"^megatron_ext.pipeline.memory_limit = 1"), in_the_config():
        schedule("1f1b", 4, 6, memory_limit=1)


def test_times_from_durations():
    seen = {("F", (0,)): [3.0, 1.0, 2.0], ("F", (1,)): [2.0], ("I", (0,)): [1.0], ("I", (1,)): [1.0],
            ("W", (0,)): [0.5], ("W", (1,)): [0.5], ("FB", (0, 1)): [2.8]}
    assert measured_times(seen, 2, 1, 0.1) == Times(2, 1, 0.5, 2.8, 0.1)
    chunked = measured_times(seen, 2, 2, 0.1)
    assert (chunked.forward, chunked.pair) == (4, 5.6)
    whole = {("F", (0,)): [1.0], ("F", (1,)): [3.0], ("B", (0,)): [2.0], ("B", (1,)): [6.0]}
    found = measured_times(whole, 2, 1, 0.0)
    assert found.input_grad == found.weight_grad == pytest.approx(2.0), "halves of a B that was never split"
    assert found.pair is None and found.stages == pytest.approx((0.5, 1.5))
