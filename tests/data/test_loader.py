"""The order of micro-batches: the same steps in every layout, and an exact resume in any other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset

from megatron_ext.config.errors import ConfigError
from megatron_ext.data import BlendedDataset, DataError, GPTDataset, MicroBatchLoader, TokenStream

LAYOUTS_OF_12 = [(B, N, 12 // (B * N)) for B in (1, 2, 3, 4, 6, 12) for N in (1, 2, 3, 4, 6, 12) if 12 % (B * N) == 0]


class Numbers:
    """Sample i is i."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def loaders(dataset: object, layout: tuple[int, int, int], **options: object) -> list[MicroBatchLoader]:
    B, N, M = layout
    return [MicroBatchLoader(dataset, B, shard, N, M, collate_fn=list, **options) for shard in range(N)]  # type: ignore


def steps(shards: list[MicroBatchLoader], count: int) -> list[list[int]]:
    """The samples of each step over all shards, in the order of their global micro-batch numbers."""
    result = []
    for _ in range(count):
        step: list[int] = []
        for _ in range(shards[0].micro_batches_per_step):
            for shard in shards:
                step += next(shard)
        result.append(step)
    return result


def test_formula_of_the_global_micro_batch() -> None:
    B, N, M = 2, 4, 3
    shards = loaders(Numbers(1000), (B, N, M), shuffle=False)
    for s in range(3):
        for k in range(M):
            for r, shard in enumerate(shards):
                g = (s * M + k) * N + r
                assert next(shard) == list(range(g * B, (g + 1) * B))
    assert shards[0].train_batch_size == 24 and shards[0].step == 3 and shards[0].consumed_samples == 72


@given(st.sampled_from(LAYOUTS_OF_12), st.integers(1, 40), st.integers(0, 5))
def test_steps_are_the_same_in_every_layout(layout: tuple[int, int, int], length: int, seed: int) -> None:
    expected = steps(loaders(Numbers(length), (12, 1, 1), seed=seed), 6)
    assert steps(loaders(Numbers(length), layout, seed=seed), 6) == expected


@given(st.integers(1, 50), st.integers(0, 9))
def test_every_epoch_is_a_new_order_of_all_samples(length: int, seed: int) -> None:
    loader = MicroBatchLoader(Numbers(length), 1, seed=seed, collate_fn=lambda samples: samples[0])
    epochs = []
    for epoch in range(3):
        assert loader.epoch == epoch
        epochs.append([next(loader) for _ in range(length)])
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 20:
        assert len({tuple(epoch) for epoch in epochs}) == 3


@given(
    st.sampled_from(LAYOUTS_OF_12), st.sampled_from(LAYOUTS_OF_12), st.integers(0, 6), st.integers(1, 30), st.booleans()
)
@settings(max_examples=100)
def test_resume_in_another_layout(
    before: tuple[int, int, int], after: tuple[int, int, int], at: int, length: int, shuffle: bool
) -> None:
    dataset = Numbers(length)
    expected = steps(loaders(dataset, (12, 1, 1), seed=5, shuffle=shuffle), at + 4)
    saved = loaders(dataset, before, seed=5, shuffle=shuffle)
    steps(saved, at)
    states = [shard.state_dict() for shard in saved]
    assert all(state == states[0] for state in states)
    resumed = loaders(dataset, after, seed=5, shuffle=shuffle)
    for shard in resumed:
        next(shard)  # whatever it has read before is forgotten
        shard.load_state_dict(states[0])
        assert shard.step == at
    assert steps(resumed, 4) == expected[at:]


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_resume_at_any_position_and_batch_size(position: int, B: int, N: int, new_B: int) -> None:
    """In the middle of a step too, and when the new batch does not divide the position."""
    dataset = Numbers(17)
    saved = loaders(dataset, (B, N, 7))
    for shard in saved:
        for _ in range(position):
            next(shard)
    resumed = loaders(dataset, (new_B, 2, 3))
    for shard in resumed:
        shard.load_state_dict(saved[-1].state_dict())
    consumed = position * B * N
    stream = steps(loaders(dataset, (1, 1, consumed + new_B * 6)), 1)[0]
    assert steps(resumed, 1)[0] == stream[consumed:]
    assert resumed[0].state_dict()["consumed_samples"] == consumed + new_B * 6


def test_state_survives_torch_save(tmp_path: object) -> None:
    data = GPTDataset(TokenStream(np.arange(50)), 4)
    loader = MicroBatchLoader(data, 2, seed=1)
    next(loader)
    path = f"{tmp_path}/state.pt"
    torch.save(loader.state_dict(), path)
    resumed = MicroBatchLoader(data, 2, seed=1)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    for expected, got in zip(next(loader), next(resumed), strict=True):
        assert torch.equal(expected, got)


def test_collates_tensors_like_torch() -> None:
    data = TensorDataset(torch.arange(12).reshape(6, 2), torch.arange(6.0))
    x, y = next(MicroBatchLoader(data, 3, shuffle=False))
    assert x.shape == (3, 2) and y.tolist() == [0.0, 1.0, 2.0]
    tokens, labels = next(MicroBatchLoader(GPTDataset(TokenStream(np.arange(50)), 4), 3))
    assert tokens.shape == labels.shape == (3, 4) and tokens.dtype == torch.int64
    assert torch.equal(tokens + 1, labels)


def test_blend_keeps_its_own_order_unless_told_otherwise() -> None:
    parts = [Numbers(40), Numbers(40)]
    blend = BlendedDataset(parts, [3, 1], seed=2, size=40)
    loader = MicroBatchLoader(blend, 40, collate_fn=list)
    assert not loader.shuffle and next(loader) == list(blend)
    assert next(MicroBatchLoader(blend, 40, shuffle=True, collate_fn=list)) != list(blend)


def test_resume_with_other_data_is_refused() -> None:
    def loader(first: int = 0, T: int = 4, **options: object) -> MicroBatchLoader:
        return MicroBatchLoader(GPTDataset(TokenStream(np.arange(first, first + 50)), T), 2, **options)  # type: ignore

    state = loader().state_dict()
    loader().load_state_dict(state)
    for other, key in [
        (loader(first=1), "dataset_fingerprint"),
        (loader(T=5), "dataset_length"),
        (loader(seed=1), "seed is 1 and was 0"),
        (loader(shuffle=False), "shuffle is False and was True"),
    ]:
        with pytest.raises(DataError, match=key):
            other.load_state_dict(state)
        assert other.consumed_samples == 0
    with pytest.raises(DataError, match="lacks seed"):
        loader().load_state_dict({key: value for key, value in state.items() if key != "seed"})
    with pytest.raises(DataError, match="consumed_samples is -1"):
        loader().load_state_dict({**state, "consumed_samples": -1})


def test_loader_refuses_what_cannot_work() -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(DataError, match="Numbers: has no samples"):
        MicroBatchLoader(Numbers(0), 1)
    for dataset in (Stream(), iter([1])):
        with pytest.raises(DataError, match="map-style dataset"):
            MicroBatchLoader(dataset, 1)  # type: ignore[arg-type]
    for sizes in ((0, 0, 1, 1), (1, 0, 0, 1), (1, 0, 1, 0), (1, 2, 2, 1), (1, -1, 2, 1)):
        with pytest.raises(ConfigError):
            MicroBatchLoader(Numbers(3), *sizes)
