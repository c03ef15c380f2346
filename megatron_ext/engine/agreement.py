"""How a script ends when something is wrong: one line for all ranks, exit code 1 on every one of them.

Errors that all ranks raise (parallel/agreement.py, and those that follow from the config alone) would otherwise be
printed by each, under a traceback each; of one that a single rank raises, the peers know only that a connection closed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_ext.config.errors import ConfigError, UserError
from megatron_ext.parallel.agreement import agree, agreed

__all__ = ["agree", "agreed", "user_errors_on_one_line"]

GATHERING = 3.0  # seconds that rank 0, which may hold the store, stays for the others to find out whether to print
_SAID = "megatron_ext/said"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "recvValue failed",
         "remote process exited")


@contextmanager
def user_errors_on_one_line() -> Iterator[None]:
    """For scripts, around everything after `init_distributed`: ends this process with exit code 1 after an error.

    A `UserError` is printed as one line, by the first rank of those that raise it. A rank whose communication fails
    because a peer has ended adds nothing to what that peer has printed. Other errors keep their traceback.
    """
    try:
        yield
    except UserError as error:
        if _of_a_lost_peer(error.__cause__):
            _say_lost()
            _leave()
        if _first_to_say(str(error)):
            _say(f"{_finder(error)}{type(error).__name__}: {error}")
        _wait_for_others(str(error))
        _leave()
    except KeyboardInterrupt:
        if _rank() == 0:
            _say("interrupted")
        _leave()
    except Exception as error:
        if _of_a_lost_peer(error):
            _say_lost()
        else:
            _first_to_say(repr(error))
            _say(f"rank {_rank()} failed\n{traceback.format_exc()}")
        _leave()


def _of_a_lost_peer(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def _say_lost() -> None:
    if not _somebody_said():
        _say(f"rank {_rank()}: the connection to a peer closed; that rank's own message says why, if it left one")


def _say(text: str) -> None:
    print(f"megatron_ext: {text}", file=sys.stderr, flush=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def _finder(error: UserError) -> str:
    """Which rank found it, if it was not all of them. What follows from the config follows on every rank."""
    if error.agreed or isinstance(error, ConfigError):
        return "" if error.rank is None else f"rank {error.rank}: "
    return f"rank {_rank()}: "


def _leave() -> NoReturn:
    """Ends the process now: a normal exit would wait for peers in the destructors of process groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _store() -> dist.Store | None:
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=GATHERING))
    return store


def _key(message: str) -> str:
    return f"{_SAID}/{hashlib.sha256(message.encode()).hexdigest()}"


def _first_to_say(message: str) -> bool:
    """Whether no other rank has this message; True if nobody can be asked: twice is better than never."""
    store = _store()
    if store is None:
        return _rank() == 0
    try:
        store.set(_SAID, "")
        return store.add(_key(message), 1) == 1
    except RuntimeError:
        return True


def _wait_for_others(message: str) -> None:
    store = _store()
    if store is None or dist.get_rank() != 0:
        return
    end = time.monotonic() + GATHERING
    with suppress(RuntimeError):  # the store is elsewhere, and gone
        while time.monotonic() < end and store.add(_key(message), 0) < dist.get_world_size():
            time.sleep(0.02)


def _somebody_said() -> bool:
    store = _store()
    try:
        return store is not None and store.check([_SAID])
    except RuntimeError:
        return False
