"""Runs a group of rows in a process of its own, so that a crash, a hang or a broken CUDA context costs no other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from kernel_rows import Item, failed, guarded

START = 120.0
"""Seconds that a process may take to import what it runs."""

_BEGUN, _END = True, None


def run_group(name: str, group: Callable[..., Iterable[Item]], *args: Any, limit: float) -> Iterator[Item]:
    """The group's items as they come.

    Args:
        group: a function of a module, called as `group(*args)`.
        limit: seconds without an item after which the group is given up.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, name, group, args))
    process.start()
    theirs.close()
    try:
        patience = START
        while ours.poll(patience):
            item = ours.recv()
            patience = limit
            if item is _END:
                process.join(patience)
                return
            if item is not _BEGUN:
                yield item
        yield failed(name, f"nothing for {patience:.0f} s")
    except EOFError:
        process.join()
        yield failed(name, f"its process ended with {process.exitcode}")
    finally:
        ours.close()
        process.kill()  # nothing, if it has ended
        process.join()


def _send(end: Connection, name: str, group: Callable[..., Iterable[Item]], args: tuple[Any, ...]) -> None:
    end.send(_BEGUN)
    for item in guarded(name, group, *args):
        end.send(item)
    end.send(_END)
