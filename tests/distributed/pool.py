"""Persistent worker processes for tests of what several ranks do: gloo on this machine, DeepSpeed initialised once.

    pool.run(function, *args)  ->  [what rank 0 returned, what rank 1 returned, ...]

`function` is defined at the top of a test module and runs in every rank with `torch.distributed` ready; arguments and
results are pickled, tensors by value. Whatever happens in one call, the next one finds a clean pool:

* after a call each rank destroys the process groups that were made, restores DeepSpeed's module globals and reseeds;
* an exception in any rank raises `WorkerError` with the traceback of that rank, and the pool is replaced;
* a rank that dies or exceeds the timeout raises `WorkerError` with the Python stack of every rank, and the pool is
  replaced.

Workers are forked from a server that has imported torch and DeepSpeed already, so a pool of four is up in about a
second. For CUDA they are spawned instead (CUDA does not survive a fork) and share the devices there are, still over
gloo.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SEED = 1234
GRACE = 4.0  # seconds that the others get to end by themselves once one has raised; a lost peer takes gloo 1 s to see


class WorkerError(RuntimeError):
    """A rank raised, died or did not end in time. `rank` is the first one to do so."""

    def __init__(self, rank: int, message: str):
        self.rank = rank
        super().__init__(message)


class WorkerPool:
    """`world_size` ranks, started when first used and again after a failure.

    Args:
        world_size: number of processes.
        device: "cpu", or "cuda" for ranks that share this machine's GPUs (LOCAL_RANK = rank modulo their number).
    """

    def __init__(self, world_size: int, device: str = "cpu"):
        self.world_size, self.device = world_size, device
        self._workers: list[_Worker] = []
        self._store: Any = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Calls `function(*args, **kwargs)` in every rank and returns the results in the order of the ranks.

        Raises:
            WorkerError: a rank raised, died, or was not done after `timeout` seconds.
        """
        if not self._workers or any(not worker.process.is_alive() for worker in self._workers):
            self.close()
            self._start()
        call = pickle.dumps((function, args, kwargs))
        for worker in self._workers:
            worker.connection.send_bytes(call)
        try:
            return self._collect(timeout)
        except BaseException:  # KeyboardInterrupt too: nobody knows what the ranks are in the middle of
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes at once. The next `run` starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
            worker.stack_file.unlink(missing_ok=True)
        self._workers, self._store = [], None

    def _start(self) -> None:
        from torch.distributed import TCPStore

        # The store lives here, on a port that the kernel picks, so that two runs of the tests can never meet on one.
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        with _environment(DS_ACCELERATOR=self.device):
            context = multiprocessing.get_context("forkserver" if self.device == "cpu" else "spawn")
            if self.device == "cpu":
                # torch._dynamo costs a second and comes with the first optimizer; pytest, for a worker imports the
                # __main__ of its parent
                context.set_forkserver_preload(["torch", "torch._dynamo", "deepspeed", "pytest"])
            self._workers = [_Worker(context, rank, self) for rank in range(self.world_size)]
        self._collect(timeout=120.0)  # each rank reports once it is ready

    def _collect(self, timeout: float) -> list[Any]:
        """One reply of each rank, in their order."""
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < self.world_size:
            waiting = {w.connection: w for w in self._workers if w.rank not in results and w.rank not in failures}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection].rank
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    ok, value = False, f"died with exit code {waiting[connection].exit_code()}"
                (results if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if not failures and len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        unfinished = [rank for rank in range(self.world_size) if rank not in results and rank not in failures]
        if failures:
            first = next(iter(failures))
            others = [f"rank {r} then {failures[r].splitlines()[0]}" for r in failures if r != first]
            lines = [f"rank {first} {failures[first]}", *others, *(f"rank {r} was still busy" for r in unfinished)]
            raise WorkerError(first, "\n".join(lines))
        stacks = "\n".join(f"--- rank {w.rank} ---\n{w.stack()}" for w in self._workers)
        raise WorkerError(unfinished[0], f"ranks {unfinished} not done after {timeout:g} s; all stacks:\n{stacks}")


class _Worker:
    """One process, seen from the test."""

    def __init__(self, context: Any, rank: int, pool: WorkerPool):
        self.rank = rank
        descriptor, name = tempfile.mkstemp(prefix=f"stack-of-rank-{rank}-")
        os.close(descriptor)
        self.stack_file = Path(name)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, rank, pool.world_size, pool._store.port, pool.device, name)
        self.process = context.Process(target=_serve, args=arguments, name=f"rank{rank}", daemon=True)
        self.process.start()
        theirs.close()  # so that the death of the worker reads as the end of the pipe

    def exit_code(self) -> int | None:
        self.process.join(5.0)
        return self.process.exitcode

    def stack(self) -> str:
        """The Python stack of each of its threads, also of one that waits inside a collective."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        return self.stack_file.read_text() or "(no stack)"


def _serve(connection: Connection, rank: int, world_size: int, port: int, device: str, stack_file: str) -> None:
    """The life of a worker: set up, then one call after another until the pipe closes."""
    stacks = open(stack_file, "w")  # noqa: SIM115  stays open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0 need not open a store: the test has
        DS_ACCELERATOR=device,
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        state = _initialize(rank, device)
    except BaseException:
        connection.send_bytes(pickle.dumps((False, f"could not start\n{traceback.format_exc()}")))
        return
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            call = connection.recv_bytes()
        except (EOFError, OSError):
            return
        _seed()
        try:
            function, args, kwargs = pickle.loads(call)
            reply = pickle.dumps((True, function(*args, **kwargs)))
        except BaseException as error:
            reply = pickle.dumps((False, f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}"))
            connection.send_bytes(reply)
            continue
        function = args = kwargs = None
        _clean(state)
        connection.send_bytes(reply)


def _initialize(rank: int, device: str) -> dict[str, Any]:
    """torch and DeepSpeed for one rank. Returns DeepSpeed's group globals as they are before anything is made."""
    import torch

    torch.set_num_threads(1)
    if device == "cuda":
        os.environ["LOCAL_RANK"] = str(rank % torch.cuda.device_count())
        torch.cuda.set_device(rank % torch.cuda.device_count())
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups

    # No operator counts as compatible, so init_distributed does not compile one (30 s). Not a documented API.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(
        dist_backend="gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=300)
    )
    return {
        name: value
        for name, value in vars(groups).items()
        if not name.startswith("__") and (value is None or isinstance(value, dict | int))
    }


def _clean(state: dict[str, Any]) -> None:
    """Undoes what a call may have left: process groups, DeepSpeed's globals, garbage that holds either."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    for name, value in state.items():
        if isinstance(value, dict):
            getattr(groups, name).clear()
        else:
            setattr(groups, name, value)
    _destroy_engines()
    gc.collect()
    world = dist.group.WORLD
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)


def _destroy_engines() -> None:
    """ZeRO's hooks hold an engine through references that the garbage collector does not see.

    An engine left behind keeps its process groups, and every group of gloo polls at 100 Hz: after fifty trainings a
    pool of eight did nothing else.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    for found in gc.get_objects():
        if issubclass(type(found), DeepSpeedEngine):  # isinstance would ask objects that warn
            found.destroy()


def _seed() -> None:
    import numpy
    import torch

    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _die_with_parent() -> None:
    """Ends a worker, even one that hangs in a collective, when the tests that started it are gone."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
