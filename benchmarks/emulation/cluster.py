"""Several nodes on this machine: network namespaces joined by a bridge, with slow links between and faster ones inside.

A node is a network namespace; its ranks are processes in it, with torch.distributed over gloo.

    between nodes   an Ethernet pair to a bridge in a namespace of its own, `tc tbf` in both directions
    inside a node   the loopback device, `tc tbf`: what a rank sends to an address of its own node never leaves it

What is emulated well is bandwidth: both kinds of link give what was asked for, less 1 % for the headers of TCP and IP,
and share it fairly among the ranks (`link_rates` measures it). A node's links are one budget that its ranks share, its
uplink in each direction and its loopback for all that they send each other; nodes of the paper have an adapter and an
NVLink port for each GPU, which is as much in sum, and the same for traffic as even as that of many random tokens.

What is not emulated: latency (not every kernel has netem; a message takes the time of a system call), and a network
that works on its own: TCP takes time of the cores that the ranks compute on, so links should be slow enough for the
wire to dominate.

Needs root and the commands `ip` and `tc`. Nothing outside of the namespaces is touched. Their names say which process
made them (its id and start time), and whoever makes a cluster removes those of processes that are gone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

UPLINK, INSIDE = "eth0", "lo"
"""Devices of a node, for `sent_bytes`."""

_PREFIX = "megatron-ext"
_PACKET = 9000
"""Bytes. Jumbo frames; at the usual 1500, the headers are 4 % of the bytes."""
_BURST = 20 * 1024
"""Bytes that a link lets through at once. Small beside a message, or short messages would seem faster than long ones;
at least what the kernel hands to a device at once, which is set to two packets."""
_QUEUE = "16mb"
_TCP = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}
"""Nothing is lost here, so Reno keeps a link full and shares it evenly; BBR, a default elsewhere, does neither when
traffic goes both ways."""
_CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x40000000, 1  # linux/sched.h, linux/prctl.h


class ClusterError(RuntimeError):
    """The cluster cannot be built here, or one of its ranks failed."""


@dataclass(frozen=True)
class Shape:
    """G nodes of L ranks, and what their links carry in 10^6 bits per second: an uplink each way, a loopback in all."""

    nodes: int
    ranks_per_node: int
    uplink: float
    inside: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def __str__(self) -> str:
        return f"{self.nodes} nodes of {self.ranks_per_node}"


class Cluster:
    """A context in which `run` starts ranks; leaving it, by an exception or a signal too, ends them and the network.

    Raises:
        ClusterError: on entering, if not root, if `ip` or `tc` is missing, or with what they answered.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        self._names = f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}"
        self._started: list[Any] = []
        self._undo = ExitStack()

    def __enter__(self) -> Cluster:
        _check_tools()
        remove_leftovers()
        with ExitStack() as undo:  # all of it, whatever fails on the way
            for number in (signal.SIGTERM, signal.SIGHUP):
                undo.callback(signal.signal, number, signal.signal(number, _leave))
            self._build(undo)
            undo.callback(self._kill)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._undo.close()

    def namespace(self, node: int) -> str:
        return f"{self._names}-node{node}"

    def _build(self, undo: ExitStack) -> None:
        fabric = f"{self._names}-fabric"
        nodes = list(map(self.namespace, range(self.shape.nodes)))
        for name in (fabric, *nodes):
            _command("ip", "netns", "add", name)
            undo.callback(_command, "ip", "netns", "delete", name)
        _command("ip", "-n", fabric, "link", "add", "bridge", "type", "bridge")
        _command("ip", "-n", fabric, "link", "set", "bridge", "up")
        for node, name in enumerate(nodes):
            port = f"node{node}"
            _command("ip", "-n", fabric, "link", "add", port, "type", "veth", "peer", "name", UPLINK, "netns", name)
            _command("ip", "-n", fabric, "link", "set", port, "master", "bridge")
            _command("ip", "-n", name, "addr", "add", f"{_address(node)}/24", "dev", UPLINK)
            _start_device(name, UPLINK, self.shape.uplink)
            _start_device(fabric, port, self.shape.uplink)
            _start_device(name, INSIDE, self.shape.inside)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 600.0) -> list[Any]:
        """Calls `function(rank, *args)` in every rank, its process group made; returns what they returned, by rank.

        Args:
            function: of a module that can be imported, as for `multiprocessing`.
            timeout: seconds for all of it.

        Raises:
            ClusterError: a rank failed (it has printed why), or time is up. No rank is left running.
        """
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or the store warns that addresses here have no names
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "megatron_ext.comm.dispatch"])
        waiting: dict[Connection, int] = {}
        try:
            for rank in range(self.shape.ranks):
                receiver, sender = context.Pipe(duplex=False)
                namespace = self.namespace(self.shape.node_of(rank))
                process = context.Process(target=_rank, args=(rank, self.shape, namespace, sender, function, args))
                process.start()
                self._started.append(process)
                sender.close()
                waiting[receiver] = rank
            return self._collect(waiting, time.monotonic() + timeout)
        finally:
            self._kill()

    def _collect(self, waiting: dict[Connection, int], deadline: float) -> list[Any]:
        found: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ClusterError(f"ranks {sorted(waiting.values())} have not finished in time")
            for receiver in [receiver for receiver in waiting if receiver in ready]:
                rank = waiting.pop(receiver)
                try:
                    found[rank] = receiver.recv()
                except EOFError:
                    raise ClusterError(f"rank {rank} on node {self.shape.node_of(rank)} failed") from None
        for process in self._started:
            process.join(timeout=10)
        return [found[rank] for rank in range(self.shape.ranks)]

    def _kill(self) -> None:
        for process in self._started:
            process.kill()
            process.join()
        self._started.clear()


def remove_leftovers() -> None:
    """Removes the namespaces of runs that were killed, and what of their ranks still lives in them."""
    for name in _namespaces():
        made_by = re.fullmatch(rf"{_PREFIX}-(\d+)-(\d+)-\w+", name)
        if made_by and _start_time(int(made_by[1])) != int(made_by[2]):
            for pid in _command("ip", "netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)
            _command("ip", "netns", "delete", name)


def sent_bytes(device: str) -> int:
    """Bytes that this node has sent through `UPLINK` or `INSIDE` so far, with the headers of TCP, IP and Ethernet.

    The kernel counts a batch of packets (here two) with the headers of one.
    """
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == device:
            return int(counters.split()[8])
    raise ClusterError(f"no network device {device} here")


def _rank(rank: int, shape: Shape, namespace: str, sender: Connection, function: Callable[..., Any],
          args: tuple[Any, ...]) -> None:
    """A rank: joins its node, makes the process group, calls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter ends us
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # if it was killed itself, nobody else would
    with open(f"/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            raise ClusterError(f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}")
    for name, value in _TCP.items():
        (Path("/proc/sys/net/ipv4") / name).write_text(value)  # the namespace's own

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % shape.ranks_per_node), WORLD_SIZE=str(shape.ranks),
                      LOCAL_WORLD_SIZE=str(shape.ranks_per_node), MASTER_ADDR=_address(0), MASTER_PORT="29500",
                      GLOO_SOCKET_IFNAME=UPLINK)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = function(rank, *args)
    dist.barrier()  # the first rank keeps the store
    sender.send(found)
    dist.destroy_process_group()


def link_rates(rank: int, shape: Shape, size: int, repeats: int = 5) -> dict[str, float]:
    """What the links really carry, in 10^6 bits of payload per second, for `Cluster.run` or a function that runs there.

    All ranks at once send to the next node and receive from the one before; then the same with the next rank of their
    own node.

    Args:
        size: bytes that a rank sends.
        repeats: of which the median counts.

    Returns:
        `{"uplink": ..., "inside": ...}`, a node's, the same on every rank.
    """
    import torch
    import torch.distributed as dist

    local, first = rank % shape.ranks_per_node, rank - rank % shape.ranks_per_node
    rates = {}
    for name, step in (("uplink", shape.ranks_per_node), ("inside", 1)):
        if name == "uplink":
            to, source = (rank + step) % shape.ranks, (rank - step) % shape.ranks
        else:
            to, source = first + (local + step) % shape.ranks_per_node, first + (local - step) % shape.ranks_per_node
        payload, received = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        seconds = []
        for _ in range(repeats + 1):
            dist.barrier()
            began = time.perf_counter()
            # The other way round, gloo would tell the peer that we are ready to receive behind all that we send it.
            works = [dist.irecv(received, source), dist.isend(payload, to)]
            for work in works:
                work.wait()
            # From the first start to the last end; all ranks have the same clock.
            times = torch.tensor([time.perf_counter(), -began], dtype=torch.float64)
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
            seconds.append(times.sum().item())
        median = sorted(seconds[1:])[repeats // 2]  # the first opens the connections
        rates[name] = 8e-6 * size * shape.ranks_per_node / median
    return rates


def _start_device(namespace: str, device: str, rate: float) -> None:
    """Starts a device that sends no more than so many 10^6 bits per second."""
    link = ("ip", "-n", namespace, "link", "set", device)
    _command(*link, "addrgenmode", "none")  # no chatter of IPv6
    _command(*link, "mtu", _PACKET, "gso_max_size", 2 * _PACKET, "up")
    _command("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf",
             "rate", f"{round(1e6 * rate)}bit", "burst", _BURST, "limit", _QUEUE)


def _address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def _check_tools() -> None:
    if os.geteuid() != 0:
        raise ClusterError("emulated nodes are network namespaces, which only root may make")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(f"emulated nodes need {' and '.join(missing)} (Debian package iproute2)")


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _command("ip", "netns", "list").splitlines()]


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; a process id alone is used again. None if there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[19])


def _command(*words: object) -> str:
    """What an `ip` or `tc` command prints.

    Raises:
        ClusterError: with its complaint.
    """
    called = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if called.returncode:
        raise ClusterError(f"{' '.join(map(str, words))}: {called.stderr.strip()}")
    return called.stdout


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
