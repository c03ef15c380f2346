"""Samples for next-token prediction out of a token stream, and blends of datasets by weight.

Documents are packed end to end and samples may cross their boundaries; attention does too (DeepSeek-V3, section 4.1:
document packing without cross-sample attention masking). There is one way to say that a position does not count: its
label is -100.

Letters: T tokens of a sample, N tokens of the stream.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ext.config.errors import ConfigError
from megatron_ext.data.errors import DataError
from megatron_ext.data.permutation import Permutation
from megatron_ext.data.stream import TokenStream
from megatron_ext.models.loss import IGNORED_LABEL

_MASK_CHUNK = 1 << 20


class SizedDataset(Protocol):
    """A map-style dataset: what torch's DataLoader takes too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def apply_loss_mask(labels: Tensor, loss_mask: Tensor) -> Tensor:
    """A copy of `labels` (any shape, int64) with -100 wherever `loss_mask` (same shape, bool or 0/1) is zero."""
    return labels.masked_fill(loss_mask == 0, IGNORED_LABEL)


class GPTDataset(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive samples of a stream: (tokens [T], labels [T]), both int64; labels are the tokens one further on.

    Sample i reads tokens i*T .. i*T + T, so neighbours share one token (the last label of one is the first token of
    the next) and every token but the very first is a label once; a remainder of fewer than T is left out.

    Args:
        stream: a TokenStream or IndexedDataset.
        sequence_length: T.
        loss_mask: [N] bool or 0/1, aligned with the stream: where it is 0 the token is never a target.
        mask_document_starts: a document's first token, which nothing before it foretells, is never a target.
        vocab_size: if given, every sample is checked as it is read (`stream.check_ids` reads all of them beforehand).

    Raises:
        DataError: too few tokens for one sample, or a mask of another length; while reading, an id out of the
            vocabulary.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        *,
        loss_mask: ArrayLike | None = None,
        mask_document_starts: bool = False,
        vocab_size: int | None = None,
    ):
        if sequence_length < 1:
            raise ConfigError("sequence_length", sequence_length, "a sample has at least one token")
        if stream.num_tokens < sequence_length + 1:
            rule = f"a sample of {sequence_length} and its last label need {sequence_length + 1}"
            raise DataError(stream.name, f"holds {stream.num_tokens} tokens", rule)
        self.stream, self.sequence_length, self.vocab_size = stream, sequence_length, vocab_size
        self.loss_mask = None if loss_mask is None else np.asarray(loss_mask)
        if self.loss_mask is not None and self.loss_mask.shape != (stream.num_tokens,):
            found = f"a loss mask of shape {list(self.loss_mask.shape)}"
            raise DataError(stream.name, found, f"it has one entry for each of the {stream.num_tokens} tokens")
        self.mask_document_starts = mask_document_starts

    def __len__(self) -> int:
        return (self.stream.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.stream.name}: sample {index} of {len(self)}")
        first, T = index * self.sequence_length, self.sequence_length
        sample = torch.from_numpy(self.stream.window(first, T + 1, self.vocab_size))
        tokens, labels = sample[:-1], sample[1:].clone()
        if self.loss_mask is not None:
            mask = np.asarray(self.loss_mask[first + 1 : first + T + 1]) != 0
            labels = apply_loss_mask(labels, torch.from_numpy(mask))
        if self.mask_document_starts:
            starts = self.stream.document_starts
            low, high = np.searchsorted(starts, (first + 1, first + T + 1))
            labels[torch.from_numpy(starts[low:high] - (first + 1))] = IGNORED_LABEL
        return tokens, labels

    def check_ids(self, vocab_size: int, shard: int = 0, num_shards: int = 1) -> None:
        """`TokenStream.check_ids` of the stream: every id, once, before training."""
        self.stream.check_ids(vocab_size, shard, num_shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the samples are, in which order and which labels count; a loader compares it before it
        resumes."""
        found = hashlib.sha256(f"{self.stream.fingerprint} {self.sequence_length}".encode())
        if self.mask_document_starts:
            found.update(b" document starts masked")
        if self.loss_mask is not None:
            found.update(b" loss mask ")
            for first in range(0, len(self.loss_mask), _MASK_CHUNK):
                found.update(np.packbits(np.asarray(self.loss_mask[first : first + _MASK_CHUNK]) != 0))
        return found.hexdigest()


class BlendedDataset(Dataset[Any]):
    """Several datasets in one order, in proportion to their weights from the first sample on.

    Sample i is a pure function of (i, seed): nothing is stored and nothing has to be replayed to resume. The j-th
    pick of a dataset with share w falls at time (j + 1/2) / w, and the blend is all picks in order of time, so that
    after i samples

        |picks of a dataset - w i|  <=  (1 + w (n - 2)) / 2       for n > 1 datasets

    (Megatron fills the most behind at each step: the same proportions, found by replaying all i steps.) A dataset is
    read through in a shuffled order, and again in another one each time it is exhausted.

    Args:
        datasets: map-style datasets whose samples have the same shapes.
        weights: one positive number each; only their proportions count.
        seed: keys the shuffles.
        size: samples of the blend; by default as many as repeat no sample of any dataset.
        shuffle: read each dataset in a shuffled order.

    Raises:
        ConfigError: weights that do not fit, or a size below one.
        DataError: an empty dataset, by number, or datasets of different sequence lengths.
    """

    def __init__(
        self,
        datasets: Sequence[SizedDataset],
        weights: Sequence[float],
        seed: int = 0,
        size: int | None = None,
        shuffle: bool = True,
    ):
        if not datasets or len(datasets) != len(weights):
            raise ConfigError("weights", list(weights), f"one for each of the {len(datasets)} datasets, at least one")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            hint = "leave a dataset of weight 0 out"
            raise ConfigError("weights", list(weights), "weights are positive finite numbers", hint)
        for number, dataset in enumerate(datasets):
            if len(dataset) == 0:
                raise DataError(f"dataset {number} of the blend", "has no samples", "every dataset holds at least one")
        lengths = {dataset.sequence_length for dataset in datasets if isinstance(dataset, GPTDataset)}
        if len(lengths) > 1:
            raise DataError("blend", f"sequence lengths {sorted(lengths)}", "one batch needs samples of one length")
        self.datasets, self.seed, self.shuffled = list(datasets), seed, shuffle
        # Shares as exact fractions: an order decided by rounding could differ between machines, and pick a sample
        # twice.
        total = sum(Fraction(weight) for weight in weights)
        self.shares = [Fraction(weight) / total for weight in weights]
        if size is None:
            # The first repetition is the pick after the last sample of some dataset; all picks before its time are new.
            parts = zip(datasets, self.shares, strict=True)
            repetition = min((len(dataset) + Fraction(1, 2)) / share for dataset, share in parts)
            size = sum(math.ceil(share * repetition - Fraction(1, 2)) for share in self.shares)
        if size < 1:
            raise ConfigError("size", size, "a blend has at least one sample")
        self.size = size

    def __len__(self) -> int:
        return self.size

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset number d, how many of the samples before `index` are from d). Raises IndexError out of range."""
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of a blend of {self.size}")
        # At time t every dataset has had floor(w t + 1/2) picks, t +- n/2 together: start where these are at most
        # `index`, and make the few picks that are missing one by one.
        time = max(Fraction(0), index - Fraction(len(self.shares), 2))
        picks = [math.floor(share * time + Fraction(1, 2)) for share in self.shares]
        upcoming = [((picks[d] + Fraction(1, 2)) / share, d) for d, share in enumerate(self.shares)]
        heapq.heapify(upcoming)
        for _ in range(index - sum(picks)):
            _, d = upcoming[0]
            picks[d] += 1
            heapq.heapreplace(upcoming, ((picks[d] + Fraction(1, 2)) / self.shares[d], d))
        _, d = upcoming[0]
        return d, picks[d]

    def __getitem__(self, index: int) -> Any:
        d, position = self.locate(index)
        epoch, place = divmod(position, len(self.datasets[d]))
        if self.shuffled:
            place = Permutation(len(self.datasets[d]), self.seed, d, epoch)[place]
        return self.datasets[d][place]

    def check_ids(self, vocab_size: int, shard: int = 0, num_shards: int = 1) -> None:
        """`TokenStream.check_ids` of every part that has ids to check."""
        for dataset in self.datasets:
            if isinstance(dataset, (GPTDataset, BlendedDataset)):
                dataset.check_ids(vocab_size, shard, num_shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the parts (by length where one has no fingerprint), their shares, the seed and the size."""
        parts = [getattr(dataset, "fingerprint", f"length {len(dataset)}") for dataset in self.datasets]
        shares = [str(share) for share in self.shares]
        return hashlib.sha256(repr((parts, shares, self.seed, self.size, self.shuffled)).encode()).hexdigest()
