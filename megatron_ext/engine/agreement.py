"""One error for all ranks: whatever one rank finds wrong, every rank hears of at once, and none is left waiting."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ext.config.errors import UserError


def agree(error: Exception | None, group: ProcessGroup) -> None:
    """Raises on all ranks if one of them met an error, so that none waits for a rank that has left.

    Args:
        error: what this rank met; None if all is well. A rank with an error raises its own.
        group: a gloo group of all ranks.

    Raises:
        UserError: elsewhere, the message of the first rank that met one.
    """
    found: list[tuple[int, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, None if error is None else (dist.get_rank(), str(error)), group=group)
    if error is not None:
        raise error
    for report in found:
        if report is not None:
            raise UserError(f"rank {report[0]}: {report[1]}")


@contextmanager
def user_errors_on_one_line() -> Iterator[None]:
    """For scripts: a `UserError` ends the process with exit code 1 and one line instead of a traceback per rank.

    Errors that all ranks agreed on are printed by rank 0 alone. Peers that waited for a rank that has ended so fail in
    their communication; the launcher ends them.
    """
    try:
        yield
    except UserError as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == 0 or not getattr(error, "agreed", True):
            print(f"megatron_ext: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a normal exit would wait for peers in the destructors of process groups
