"""Samples and blends: every token a label once, masks that become -100, and proportions within their bound."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.errors import ConfigError
from megatron_ext.data import BlendedDataset, DataError, GPTDataset, TokenStream, apply_loss_mask
from megatron_ext.data.permutation import Permutation


@given(st.integers(2, 60), st.integers(1, 12))
def test_every_token_but_the_first_is_a_label_once(N: int, T: int) -> None:
    stream = TokenStream(np.arange(100, 100 + N, dtype=np.uint16))
    if N < T + 1:
        with pytest.raises(DataError, match=f"holds {N} tokens.*need {T + 1}"):
            GPTDataset(stream, T)
        return
    samples = list(GPTDataset(stream, T))
    assert len(samples) == (N - 1) // T
    for tokens, labels in samples:
        assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == labels.shape == (T,)
        assert torch.equal(labels, tokens + 1)
    assert torch.cat([labels for _, labels in samples]).tolist() == list(range(101, 101 + len(samples) * T))


def test_tokens_and_labels_do_not_share_memory() -> None:
    tokens, labels = GPTDataset(TokenStream(np.arange(9, dtype=np.int64)), 4)[0]
    labels.fill_(-100)
    assert tokens.tolist() == [0, 1, 2, 3]


def test_loss_mask_speaks_of_targets() -> None:
    mask = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1])
    data = GPTDataset(TokenStream(np.arange(10, 19)), 4, loss_mask=mask)
    assert [labels.tolist() for _, labels in data] == [[-100, 12, 13, -100], [15, -100, 17, 18]]
    assert data[1][0].tolist() == [14, 15, 16, 17]  # what is no target is still read
    with pytest.raises(DataError, match=r"loss mask of shape \[8\]"):
        GPTDataset(TokenStream(np.arange(9)), 4, loss_mask=mask[:8])
    labels = torch.tensor([[1, 2], [3, 4]])
    assert apply_loss_mask(labels, torch.tensor([[1, 0], [0, 1]])).tolist() == [[1, -100], [-100, 4]]
    assert labels.tolist() == [[1, 2], [3, 4]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 6))
def test_document_starts_can_be_left_out_of_the_loss(sizes: list[int], T: int) -> None:
    documents = [[10 * d + i for i in range(size)] for d, size in enumerate(sizes)]
    stream = TokenStream.from_documents(documents)
    if stream.num_tokens < T + 1:
        return
    plain, masked = GPTDataset(stream, T), GPTDataset(stream, T, mask_document_starts=True)
    for (tokens, labels), (same_tokens, masked_labels) in zip(plain, masked, strict=True):
        assert torch.equal(tokens, same_tokens)
        assert torch.equal(masked_labels, torch.where(labels % 10 == 0, -100, labels))


def test_id_outside_the_vocabulary_is_named_when_read() -> None:
    data = GPTDataset(TokenStream([1, 2, 3, 4, 5, 9], [0, 4, 6], name="corpus"), 2, vocab_size=9)
    data[0], data[1]
    stream = TokenStream([1, 2, 3, 4, 9], [0, 3, 5], name="corpus")
    with pytest.raises(DataError, match=r"corpus: document 1 holds token id 9 at its position 1; ids lie in 0\.\.8"):
        GPTDataset(stream, 2, vocab_size=9)[1]
    with pytest.raises(DataError, match="token id 9"):
        GPTDataset(stream, 2).check_ids(9)
    with pytest.raises(DataError, match="token id 9"):
        BlendedDataset([GPTDataset(TokenStream([1, 2, 3]), 2), GPTDataset(stream, 2)], [1, 1]).check_ids(9)


def test_sample_out_of_range_ends_an_iteration() -> None:
    data = GPTDataset(TokenStream(np.arange(9)), 4)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            data[index]
    with pytest.raises(ConfigError, match="sequence_length = 0"):
        GPTDataset(TokenStream(np.arange(9)), 0)


# --- permutations


@given(st.integers(1, 3000), st.integers(-3, 2**63), st.integers(0, 9))
@settings(max_examples=40)
def test_permutation_is_a_bijection(length: int, seed: int, epoch: int) -> None:
    order = Permutation(length, seed, epoch)
    assert sorted(order) == list(range(length))
    if length > 50:
        assert list(order) != list(range(length))
        assert list(order) != list(Permutation(length, seed, epoch + 1))
        assert list(order) != list(Permutation(length, seed + 1, epoch))


def test_permutation_never_changes_between_versions() -> None:
    """Literal numbers: a checkpoint's position is worthless if the order behind it moves."""
    assert list(Permutation(10, 1234, 0)) == [3, 4, 1, 5, 8, 7, 0, 2, 9, 6]
    assert [Permutation(10**9, 0, 7)[i] for i in range(3)] == [147800886, 698390157, 23528010]


def test_permutations_are_uniform() -> None:
    seeds = 4800
    counts = Counter(tuple(Permutation(4, seed, 0)) for seed in range(seeds))
    expected = seeds / 24
    chi_squared = sum((counts[order] - expected) ** 2 / expected for order in permutations(range(4)))
    assert chi_squared < 52.6  # 23 degrees of freedom: exceeded by chance once in 2,500
    order = np.array(list(Permutation(4096, 1, 1)))
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 0.06
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06


# --- blends


class Numbered:
    """Sample i of dataset `name` is (name, i)."""

    def __init__(self, name: str, length: int):
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[str, int]:
        assert 0 <= index < self.length
        return self.name, index


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=7)


@given(WEIGHTS)
@settings(max_examples=40)
def test_blend_keeps_its_proportions_from_the_first_sample_on(weights: list[float]) -> None:
    n, shares = len(weights), np.array(weights) / sum(weights)
    blend = BlendedDataset([Numbered(str(d), 3) for d in range(n)], weights, size=200)
    picks = np.zeros(n)
    for i in range(200):
        d, position = blend.locate(i)
        assert position == picks[d]  # a pure function of i that agrees with counting
        picks[d] += 1
        bound = (1 + shares * (n - 2)) / 2 if n > 1 else 0
        assert (np.abs(picks - shares * (i + 1)) <= bound + 1e-9).all()


def test_blend_reaches_far_samples_at_once() -> None:
    blend = BlendedDataset([Numbered("a", 10), Numbered("b", 10)], [0.7, 0.3], size=10**12)
    picks = Counter(blend.locate(10**12 - 1000 + i)[0] for i in range(1000))
    assert abs(picks[0] - 700) <= 1
    assert BlendedDataset([Numbered("a", 9)], [3.0]).size == 9


@given(WEIGHTS, st.integers(1, 40))
@settings(max_examples=30)
def test_default_size_repeats_nothing_and_uses_one_dataset_up(weights: list[float], length: int) -> None:
    lengths = [length + d for d in range(len(weights))]
    blend = BlendedDataset([Numbered(str(d), size) for d, size in enumerate(lengths)], weights)
    picks = [0] * len(weights)
    for i in range(min(len(blend), 500)):
        d, _ = blend.locate(i)
        picks[d] += 1
    assert all(count <= size for count, size in zip(picks, lengths, strict=True))
    if len(blend) <= 500:
        assert any(count == size for count, size in zip(picks, lengths, strict=True))


def test_blend_reads_each_dataset_through_before_it_repeats() -> None:
    blend = BlendedDataset([Numbered("a", 5), Numbered("b", 40)], [1, 1], seed=3, size=40)
    a = [index for name, index in blend if name == "a"]
    assert [sorted(a[first : first + 5]) for first in (0, 5, 10, 15)] == [list(range(5))] * 4
    assert len({tuple(a[first : first + 5]) for first in (0, 5, 10, 15)}) > 1
    b = [index for name, index in blend if name == "b"]
    assert len(set(b)) == 20 and b != sorted(b)
    assert list(blend) == list(BlendedDataset(blend.datasets, [2, 2], seed=3, size=40))
    assert list(blend) != list(BlendedDataset(blend.datasets, [1, 1], seed=4, size=40))
    straight = BlendedDataset(blend.datasets, [1, 1], size=20, shuffle=False)
    assert [index for name, index in straight if name == "b"] == list(range(10))


def test_blend_refuses_what_cannot_work() -> None:
    a, b = Numbered("a", 5), Numbered("b", 5)
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ConfigError, match="weights"):
            BlendedDataset([a, b], weights)
    with pytest.raises(ConfigError, match="weights"):
        BlendedDataset([], [])
    with pytest.raises(ConfigError, match="size = 0"):
        BlendedDataset([a, b], [1, 1], size=0)
    with pytest.raises(DataError, match="dataset 1 of the blend: has no samples"):
        BlendedDataset([a, Numbered("b", 0)], [1, 1])
    stream = TokenStream(np.arange(20))
    with pytest.raises(DataError, match=r"sequence lengths \[4, 5\]"):
        BlendedDataset([GPTDataset(stream, 4), GPTDataset(stream, 5)], [1, 1])


def test_fingerprint_of_a_blend_sees_all_that_orders_it() -> None:
    one, two = GPTDataset(TokenStream(np.arange(20)), 4), GPTDataset(TokenStream(np.arange(1, 21)), 4)
    blends = [([one, two], [1, 1], 0, 8), ([two, one], [1, 1], 0, 8), ([one, two], [1, 2], 0, 8)]
    blends += [([one, two], [1, 1], 1, 8), ([one, two], [1, 1], 0, 9)]
    assert len({BlendedDataset(*arguments).fingerprint for arguments in blends}) == len(blends)
    assert GPTDataset(TokenStream(np.arange(20)), 5).fingerprint != one.fingerprint


def test_fingerprint_of_a_dataset_sees_what_counts() -> None:
    stream, mask = TokenStream.from_documents([[1, 2, 3, 4], [5, 6, 7]]), np.array([1, 1, 0, 1, 1, 1, 1])
    kinds = [GPTDataset(stream, 2), GPTDataset(stream, 3), GPTDataset(stream, 2, mask_document_starts=True),
             *(GPTDataset(stream, 2, loss_mask=m) for m in (mask, mask[::-1], np.ones(7))),
             GPTDataset(stream, 2, loss_mask=mask, mask_document_starts=True)]
    assert len({data.fingerprint for data in kinds}) == len(kinds)
    for same in (mask.astype(bool), mask.astype(np.float32), mask.tolist()):
        assert GPTDataset(stream, 2, loss_mask=same).fingerprint == kinds[3].fingerprint


def test_fingerprint_reads_a_long_mask_to_its_end() -> None:
    stream, mask = TokenStream(np.zeros(3_000_001, dtype=np.uint8)), np.ones(3_000_001, dtype=bool)
    whole = GPTDataset(stream, 8, loss_mask=mask).fingerprint
    mask[-1] = False
    assert GPTDataset(stream, 8, loss_mask=mask).fingerprint != whole
