"""Durations from a block's phases: what alone adds up, what a pair hides."""

from __future__ import annotations

import pytest

from megatron_ext.pipeline import Times
from megatron_ext.pipeline.phases import Phases


@pytest.mark.parametrize(
    ("ratio", "split", "hidden"),
    [(0.25, True, 1), (0.5, False, 1), (1.0, True, 1), (1.0, False, 1), (1.5, True, 0.98), (1.5, False, 0.83)],
)
def test_a_pair_hides_the_all_to_alls(ratio, split, hidden):
    phases = Phases(attention=1, dispatch=ratio, mlp=1, combine=ratio, blocks=4, split=split)
    assert 1 - phases.exposed / phases.communication == pytest.approx(hidden, abs=0.005)
    assert phases.pair == pytest.approx(24 + phases.exposed)


def test_alone_a_computation_waits_for_its_communication():
    phases = Phases(2, 0.5, 3, 0.25, attention_input_grad=4, mlp_input_grad=5, attention_weight_grad=1, blocks=3)
    assert phases.times(message=0.1) == Times(3 * 5.75, 3 * 9.75, 3 * 4, pair=phases.pair, message=0.1)
    assert phases.pair < 3 * (5.75 + 9.75 + 4)


def test_a_pair_of_one_block_by_hand():
    # computation: attention F 0-1, MLP I 2-3 (combine B takes 0-2), MLP W 3-4, MLP F 4-5 (dispatch F takes 2-4),
    # attention I 6-7 (dispatch B takes 4-6), attention W 7-8; communication: combine F 6-8
    assert Phases(1, 2, 1, 2).pair == 8
    # a full backward sends its gradient on after MLP W only, which here is no later
    assert Phases(1, 2, 1, 2, split=False).pair == 8
    assert Phases(1, 0, 1, 0).pair == 6 and Phases(1, 0, 1, 0).exposed == 0
