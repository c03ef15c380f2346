"""A plan carried out: workers stream tensors into files, each of which is whole or not there; cut off, it goes on.

    <dst>.converting/                   what is being written; takes the name <dst> when all of it is there
        <file>.converting               a file in work; takes its name after fsync
        progress.jsonl                  a line for each file that is whole: its size and checksums
    <dst>/megatron_ext_manifest.json    the same for all files, written last

The same command after a crash keeps the whole files, removes the others, and writes the rest; since every byte follows
from the plan and the source, the result is the same. A failure leaves no <dst>.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from multiprocessing import get_context
from pathlib import Path

from megatron_ext.checkpoint.convert.journal import JOURNAL, UNFINISHED, State, locked, sync_folder, write_document
from megatron_ext.checkpoint.convert.plan import Plan
from megatron_ext.checkpoint.convert.source import MANIFEST, Check
from megatron_ext.checkpoint.convert.tensors import Stored, TargetFile
from megatron_ext.checkpoint.convert.work import Unit, do, start_worker
from megatron_ext.config.errors import CheckpointError

_UNIT_BYTES = 1 << 28
Progress = Callable[[int], None]
"""Told how many bytes have been written since it was last told."""


def run(plan: Plan, destination: Path, workers: int = 1, progress: Progress | None = None) -> bool:
    """Carries out a plan, or goes on with it.

    Args:
        plan: of `make_plan`.
        destination: a folder that does not exist, or the whole result of the same plan.
        workers: processes; 1 works in this one.
        progress: told how many bytes are done.

    Returns:
        Whether anything was written; not if it was all there.

    Raises:
        CheckpointError: naming file and tensor; `destination` does not exist then.
    """
    destination = Path(os.path.abspath(destination))
    work = destination.with_name(destination.name + UNFINISHED)
    state = State(plan, work)
    if _is_there(state, destination):
        return False
    with locked(work) as state.lock:
        try:
            if _is_there(state, destination):  # another process was quicker
                work.rmdir()
                return False
            state.resume()
            _check_space(plan, state)
            (progress or _silent)(sum(file.size for file in plan.files if file.path in state.done))
            _write_files(state, workers, progress or _silent)
            _finish(state, destination)
        except OSError as error:
            _forget_if_empty(state)
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror}"
            raise CheckpointError(error.filename or work, f"cannot be written: {what}", None, state.hint) from None
        except CheckpointError:
            _forget_if_empty(state)
            raise
    return True


def _forget_if_empty(state: State) -> None:
    """A failure before any file was whole leaves nothing behind; nor does one that has nothing to go on with."""
    if state.resumed and not state.done:
        shutil.rmtree(state.work, ignore_errors=True)


def _check_space(plan: Plan, state: State) -> None:
    needed = plan.size - sum(file.size for file in plan.files if file.path in state.done)
    status = os.statvfs(state.work)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise CheckpointError(state.work, f"needs {needed / 1e9:.3g} GB", f"the disk has {free / 1e9:.3g} GB left",
                              state.hint)


@dataclass
class _Writing:
    """Portions that are being written, and files that are being made durable behind them."""

    state: State
    progress: Progress
    sealing: ThreadPoolExecutor
    pending: dict[Future[dict[str, str]], tuple[TargetFile, Unit]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    sealed: list[Future[None]] = field(default_factory=list)

    def collect(self) -> None:
        """Waits for a portion; a file whose portions are all there is sealed."""
        for future in wait(self.pending, return_when=FIRST_COMPLETED).done:
            file, unit = self.pending.pop(future)
            try:
                self.digests[file.path] |= future.result()
            except BrokenProcessPool:
                raise CheckpointError(unit.final, "cannot be written: a worker was killed", "perhaps out of memory",
                                      self.state.hint, tensor=unit.tensors[0].name) from None
            self.progress(sum(tensor.nbytes for tensor in unit.tensors))
            self.left[file.path] -= 1
            if not self.left[file.path]:
                self.seal(file)

    def seal(self, file: TargetFile) -> None:
        """Has a file made durable, in a thread: the disk is slower than what comes after."""
        while self.sealed and (self.sealed[0].done() or len(self.sealed) > 4):
            self.sealed.pop(0).result()
        self.sealed.append(self.sealing.submit(_complete, self.state, file, self.digests.pop(file.path)))


def _write_files(state: State, workers: int, progress: Progress) -> None:
    """Writes what is not there yet, portion by portion, on all workers at once.

    As many files as there are workers are in work together: two that write into one file wait for each other.
    """
    with ThreadPoolExecutor(1) as sealing, _pool(workers, state.lock) as submit:
        writing = _Writing(state, progress, sealing)
        files = _units_of_files(state)
        while batch := list(islice(files, workers)):
            for file, units in batch:
                _create(state, file)
                writing.left[file.path], writing.digests[file.path] = len(units), {}
                if not units:
                    writing.seal(file)
            for turn in zip_longest(*([(file, unit) for unit in units] for file, units in batch)):
                for file, unit in filter(None, turn):
                    while len(writing.pending) >= 2 * workers:
                        writing.collect()
                    writing.pending[submit(unit)] = file, unit
        while writing.pending:
            writing.collect()
        for future in writing.sealed:
            future.result()
    assert set(state.done) == {file.path for file in state.plan.files}


@contextmanager
def _pool(workers: int, lock: int) -> Iterator[Callable[[Unit], Future[dict[str, str]]]]:
    """A function that has a portion written: in this process, or in one of several of its own."""
    if workers == 1:
        yield _here
        return
    # Workers only read, compute on one thread and write: forking, which costs nothing, is safe for that.
    forks = sys.platform == "linux"
    context = get_context("fork" if forks else "spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (os.getpid(), lock if forks else None))
    try:
        yield lambda unit: pool.submit(do, unit)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _here(unit: Unit) -> Future[dict[str, str]]:
    future: Future[dict[str, str]] = Future()
    future.set_result(do(unit))
    return future


def _create(state: State, file: TargetFile) -> None:
    """The file in its full length, with all but its tensors. (Allocating it makes ext4 write at half the speed.)"""
    path = _temporary(state, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, file.size)
            for offset, content in file.literals:
                while content:
                    written = os.pwrite(descriptor, content, offset)
                    content, offset = content[written:], offset + written
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path).removesuffix(UNFINISHED)) from None


def _temporary(state: State, file: TargetFile) -> Path:
    path = state.work / file.path
    return path.with_name(path.name + UNFINISHED)


def _complete(state: State, file: TargetFile, digests: dict[str, str]) -> None:
    path = _temporary(state, file)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(path, state.work / file.path)
    sync_folder(path.parent)
    state.add(file, digests)


def _finish(state: State, destination: Path) -> None:
    """Documents, the manifest, and the name."""
    plan, listed = state.plan, dict(state.done)
    documents = dict(plan.documents)
    for name in plan.copies:
        documents[name] = plan.source.folder.read(name)
    for name, content in documents.items():
        write_document(state.work / name, content)
        listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": 1, "layout": plan.format.name, "plan": plan.fingerprint, "from": state.identity,
                "files": {name: listed[name] for name in sorted(listed)}}
    write_document(state.work / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    sync_folder(state.work)
    os.rename(state.work, destination)
    sync_folder(destination.parent)
    (destination / JOURNAL).unlink()


def _is_there(state: State, destination: Path) -> bool:
    """Whether the result is there.

    Raises:
        CheckpointError: something else is.
    """
    if not os.path.lexists(destination):
        return False
    if _is_result(state, destination):
        return True
    raise CheckpointError(destination, "already exists", "it is not, or not any more, what this conversion makes of "
                          "its source as it is now", "choose another name, or remove it")


def _is_result(state: State, destination: Path) -> bool:
    """Whether a folder is the whole result of a plan and of its source as it is now.

    A journal that a crash has left in it is removed.
    """
    try:
        manifest = json.loads((destination / MANIFEST).read_text())
        whole = manifest["plan"] == state.plan.fingerprint and manifest["from"] == state.identity and all(
            (destination / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if whole:
        (destination / JOURNAL).unlink(missing_ok=True)
    return whole


def _silent(count: int) -> None:
    pass


def _units_of_files(state: State) -> Iterator[tuple[TargetFile, list[Unit]]]:
    """Files that are not whole yet, in portions. Every comparison goes with the first portion that it concerns."""
    plan = state.plan
    checks: dict[str, list[Check]] = {}
    for check in plan.checks:
        checks.setdefault(check.canonical, []).append(check)
    sums = dict(plan.source.digests)
    order = {name: number for number, name in enumerate(plan.recipes)}
    for file in plan.files:
        units = [_unit(state, file, portion, checks, sums) for portion in _portions(order, file)]
        if file.path not in state.done:
            yield file, units


def _unit(state: State, file: TargetFile, tensors: list[Stored], checks: dict[str, list[Check]],
          sums: dict[tuple[str, str], str]) -> Unit:
    plan, folder = state.plan, state.plan.source.folder
    names = {part.canonical for tensor in tensors for part in tensor.parts}
    unit = Unit(folder.path, folder.follow_links, _temporary(state, file), state.work / file.path, tensors,
                {name: plan.recipes[name] for name in names},
                crcs={tensor.name: file.crcs[tensor.name] for tensor in tensors if tensor.name in file.crcs})
    for name in sorted(names):
        unit.checks += checks.pop(name, [])
    for tensor in tensors if sums else ():
        for part in tensor.parts:
            recipe = plan.recipes[part.canonical]
            pieces = recipe.origin.pieces + (recipe.scale.pieces if recipe.scale is not None else ())
            for stored, from_part in pieces:
                digest = sums.pop((stored.file, stored.name), None)
                if digest is None:
                    continue
                moved = recipe.dtype == recipe.origin.dtype and not recipe.new_scale and tensor.parts == (from_part,) \
                    and tensor.shape == stored.shape
                if moved:
                    unit.expected[tensor.name] = stored, digest
                else:
                    unit.verify.append((stored, digest))
    return unit


def _portions(order: dict[str, int], file: TargetFile) -> Iterator[list[Stored]]:
    """The tensors of a file in portions that are worth a worker; a weight comes just before its scales."""
    tensors = sorted(file.tensors, key=lambda t: order[t.parts[0].canonical] if t.parts else -1)
    portion: list[Stored] = []
    size = 0
    for tensor in tensors:
        portion.append(tensor)
        size += tensor.nbytes
        if size >= _UNIT_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
