"""One error for all ranks: whatever one rank finds wrong, every rank raises, and none is left waiting for it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ext.config.errors import UserError


def agree(error: UserError | None, group: ProcessGroup) -> None:
    """Raises the same error on all ranks if one of them has met one; collective.

    The same type too, so that a script may catch it without its ranks parting ways.

    Args:
        error: what this rank met; None if all is well.
        group: a gloo group of all ranks.

    Raises:
        UserError: that of the first rank which met one; its `rank` says which, unless all ranks met that error.
    """
    try:
        pickle.dumps(error)
    except Exception:  # it holds a value that cannot travel
        error = UserError(str(error))
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, error, group=group)
    met = [(rank, other) for rank, other in enumerate(found) if other is not None]
    if not met:
        return
    first, shared = met[0]
    if error is not None and str(error) == str(shared):
        shared = error  # with the traceback of this rank
    if any(other is None or str(other) != str(shared) for other in found):
        shared.rank = first
    shared.agreed = True
    raise shared


@contextmanager
def agreed(group: ProcessGroup) -> Iterator[None]:
    """`agree` on whatever `UserError` the block raises on any rank. The block must do nothing collective."""
    error: UserError | None = None
    try:
        yield
    except UserError as found:
        error = found
    agree(error, group)
