"""A mistake that costs half of the data: two shards that read the same batches. Looked for once, at the first batch."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

log = logging.getLogger("megatron_ext")


def compare_first_batches(
    iterator: Iterator[Any] | None, shard: int, shards: int, control: ProcessGroup
) -> Iterator[Any] | None:
    """Warns, on rank 0, if two shards begin with the same inputs. Collective.

    Args:
        iterator: the data of this rank; None where none is read.
        shard, shards: which of the 2D shards it is.
        control: a gloo group of all ranks.

    Returns:
        The iterator with its first batch put back.
    """
    mine = None
    if iterator is not None:
        first = next(iterator, None)
        if first is not None:
            mine = (shard, fingerprint(first))
            iterator = itertools.chain([first], iterator)
    found: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(found, mine, group=control)
    if dist.get_rank() == 0:
        seen: dict[str, int] = {}
        for number, digest in filter(None, found):
            if digest in seen:
                log.warning(
                    "data shards %d and %d of %d read identical first batches: give each rank its own shard by "
                    "engine.data_parallel_rank and engine.data_parallel_world_size", seen[digest], number, shards)
                break
            seen[digest] = number
    return iterator


def fingerprint(batch: Any) -> str:
    """Of the inputs of a batch."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for v in value:
                add(v)
        elif isinstance(value, Tensor):
            digest.update(str((tuple(value.shape), value.dtype)).encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    add(batch[0] if isinstance(batch, (tuple, list)) and batch else batch)
    return digest.hexdigest()
