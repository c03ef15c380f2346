"""Micro-batches for one data-parallel shard, in an order that no layout can change.

The training stream is one endless sequence of samples: position p is sample p mod n of epoch p // n, through that
epoch's own shuffle. An optimizer step takes the next train_batch_size positions, whoever works on them:

    micro-batch j of shard r holds positions  base + (j * num_shards + r) * B ... + B - 1

so the samples of a step depend on nothing but how many came before it, and a checkpoint stores that one number. Under
DualPipe the shards are 2D: both directions of a pipeline read their own.

Letters: B samples of a micro-batch, n samples of the dataset, D pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, default_collate

from megatron_ext.config.errors import ConfigError
from megatron_ext.data.dataset import SizedDataset
from megatron_ext.data.errors import DataError
from megatron_ext.data.permutation import Permutation

_STATE_KEYS = ("consumed_samples", "seed", "shuffle", "dataset_length", "dataset_fingerprint")


class MicroBatchLoader(Iterator[Any]):
    """An endless iterator over the micro-batches of one shard.

    Args:
        dataset: any map-style dataset; its attributes `fingerprint` (str) and `shuffled` (bool) are read if there.
        micro_batch_size: B.
        shard, num_shards: which data-parallel shard this is.
        micro_batches_per_step: micro-batches of one shard in an optimizer step; gives `train_batch_size` and `step`.
        seed: keys the shuffles, with the epoch.
        shuffle: draw a new order for each epoch; by default unless the dataset says that it is `shuffled` already.
        collate_fn: list of B samples -> batch; torch's default_collate if left out.

    Raises:
        ConfigError: sizes below one, or a shard that does not exist.
        DataError: a dataset without samples or without a length.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        micro_batch_size: int,
        shard: int = 0,
        num_shards: int = 1,
        micro_batches_per_step: int = 1,
        *,
        seed: int = 0,
        shuffle: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ):
        sizes = {"micro_batch_size": micro_batch_size, "num_shards": num_shards}
        for key, value in {**sizes, "micro_batches_per_step": micro_batches_per_step}.items():
            if value < 1:
                raise ConfigError(key, value, "must be at least 1")
        if not 0 <= shard < num_shards:
            raise ConfigError("shard", shard, f"must lie in 0..{num_shards - 1}")
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise DataError(type(dataset).__name__, "has no length or no index", "a map-style dataset is needed")
        if len(dataset) == 0:
            raise DataError(type(dataset).__name__, "has no samples", "training data holds at least one")
        self.dataset, self.micro_batch_size = dataset, micro_batch_size
        self.shard, self.num_shards, self.micro_batches_per_step = shard, num_shards, micro_batches_per_step
        self.seed = seed
        self.shuffle = not getattr(dataset, "shuffled", False) if shuffle is None else shuffle
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self._base = 0  # position where this layout took over
        self._micro_batches = 0  # handed out by this shard since then
        self._order: tuple[int, Permutation] | None = None  # the epoch last read from

    @property
    def train_batch_size(self) -> int:
        """Samples of one optimizer step, over all shards."""
        return self.micro_batch_size * self.num_shards * self.micro_batches_per_step

    @property
    def consumed_samples(self) -> int:
        """Samples handed out by all shards together, each as far as this one."""
        return self._base + self._micro_batches * self.num_shards * self.micro_batch_size

    @property
    def step(self) -> int:
        """Whole optimizer steps of this train_batch_size that the consumed samples make."""
        return self.consumed_samples // self.train_batch_size

    @property
    def epoch(self) -> int:
        """The pass over the dataset that the next global sample belongs to, from 0."""
        return self.consumed_samples // len(self.dataset)

    def __iter__(self) -> MicroBatchLoader:
        return self

    def __next__(self) -> Any:
        first = self._base + (self._micro_batches * self.num_shards + self.shard) * self.micro_batch_size
        samples = [self.dataset[self.index(first + i)] for i in range(self.micro_batch_size)]
        self._micro_batches += 1
        return self.collate_fn(samples)

    def index(self, position: int) -> int:
        """The dataset index at a position of the endless stream."""
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return place
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, Permutation(len(self.dataset), self.seed, epoch))
        return self._order[1][place]

    def state_dict(self) -> dict[str, Any]:
        """The position of the whole job and what it is a position in; the same on every shard after a whole step."""
        return {
            "consumed_samples": self.consumed_samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "dataset_length": len(self.dataset),
            "dataset_fingerprint": getattr(self.dataset, "fingerprint", None),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the saved position, whatever the layout and the batch sizes were when it was saved.

        Raises:
            DataError: the state belongs to another dataset or another order of it.
        """
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise DataError("data position", f"lacks {', '.join(missing)}", "it was not saved by MicroBatchLoader")
        ours = self.state_dict()
        for key in _STATE_KEYS[1:]:
            if state[key] != ours[key]:
                found = f"{key} is {ours[key]!r} and was {state[key]!r} when it was saved"
                rule = "the samples would come in another order; resume with the same data and settings"
                raise DataError("data position", found, rule)
        consumed = state["consumed_samples"]
        if not isinstance(consumed, int) or consumed < 0:
            raise DataError("data position", f"consumed_samples is {consumed!r}", "a count of samples")
        self._base, self._micro_batches = consumed, 0
