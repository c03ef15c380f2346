"""One error for all ranks: whatever one rank finds wrong, every rank hears of at once, and none is left waiting."""

from __future__ import annotations

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
