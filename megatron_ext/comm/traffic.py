"""What expert dispatch and combine send, and how long they are waited for.

Bytes are payload as handed to a collective. What a rank keeps for itself is not counted; the rest goes inside a node
("node") or between nodes ("fabric"). Without a node layout all ranks count as one node.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

KINDS = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
LINKS = ("self", "node", "fabric")


class Traffic:
    """Sums over the dispatchers that share it, until taken."""

    def __init__(self) -> None:
        self._sums: Counter[tuple[str, str]] = Counter()

    def sent(self, kind: str, links: Sequence[str], sizes: Sequence[int]) -> None:
        """Counts `sizes[i]` bytes to a peer over `links[i]`."""
        for link, size in zip(links, sizes, strict=True):
            if link != "self":
                self._sums[kind, link] += size

    def waited(self, kind: str, seconds: float) -> None:
        """The host stood still: exposed time. (NCCL's waits are the device's, and return at once.)"""
        self._sums[kind, "exposed"] += seconds  # type: ignore[assignment]

    def done(self, kind: str, started: float) -> None:
        """An operation that was started at `started`, a `time.perf_counter`, has been finished."""
        self._sums[kind, "under_way"] += time.perf_counter() - started  # type: ignore[assignment]

    def take(self) -> dict[str, dict[str, float]]:
        """Per kind: bytes sent inside the "node" and over the "fabric", seconds "exposed" (waited for) and "under_way"
        (from start to the return of the last finish). Starts again from nothing."""
        sums, self._sums = self._sums, Counter()
        return {kind: {what: sums[kind, what] for what in ("node", "fabric", "exposed", "under_way")} for kind in KINDS}
