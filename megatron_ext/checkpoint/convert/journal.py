"""What is done of a conversion, on disk: the journal of whole files, the lock on the folder in work, durable writes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.convert.plan import Plan
from megatron_ext.checkpoint.convert.tensors import TargetFile
from megatron_ext.config.errors import CheckpointError

UNFINISHED = ".converting"
"""Not the engine's suffix: its saves clear away what saves that were cut off have left."""
JOURNAL = "progress.jsonl"
_PATIENCE = 5.0
"""Seconds: what was killed may take a moment to die."""


@dataclass
class State:
    """A conversion in work: which files are whole.

    Attributes:
        plan: what is done.
        work: the folder in work.
        done: file -> size and checksums.
        resumed: whether the folder has been found to be of this plan.
        lock: the descriptor by which it is held.
    """

    plan: Plan
    work: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    resumed: bool = False
    lock: int = -1

    @cached_property
    def identity(self) -> str:
        """The plan, and the files of its source as they are now."""
        digest = hashlib.sha256(self.plan.fingerprint.encode())
        for name in sorted({stored.file for stored in self.plan.source.stored}):
            status = os.stat(self.plan.source.folder / name)
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    @property
    def hint(self) -> str | None:
        return f"what is done is kept in {self.work}, and the same command goes on from there" if self.done else None

    def resume(self) -> None:
        """Reads the journal, and removes what it does not vouch for."""
        journal = self.work / JOURNAL
        sizes = {file.path: file.size for file in self.plan.files}
        lines = read_lines(journal)
        if not lines and (found := [path.name for path in self.work.iterdir() if not path.name.startswith(JOURNAL)]):
            raise CheckpointError(self.work, f"holds {found[0]}, and no journal of a conversion",
                                  "it is where the result would be written first", "remove it or choose another name")
        if lines and lines[0].get("plan") != self.identity:
            raise CheckpointError(self.work, "is what another conversion has left", "its source or its options differ",
                                  "remove it to start anew")
        for line in lines[1:]:
            if not line.keys() >= {"file", "bytes", "header", "tensors"}:
                break
            path = self.work / line["file"]
            if sizes.get(line["file"]) == line["bytes"] and path.is_file() and path.stat().st_size == line["bytes"]:
                self.done[line["file"]] = {key: line[key] for key in ("bytes", "header", "tensors")}
        for path in sorted(self.work.rglob("*"), reverse=True):
            name = path.relative_to(self.work).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in self.done and name != JOURNAL:  # without it the rest would be nobody's
                path.unlink()
        self._write(journal)
        self.resumed = True

    def _write(self, journal: Path) -> None:
        temporary = journal.with_name(JOURNAL + UNFINISHED)
        with open(temporary, "w") as file:
            file.write(json.dumps({"plan": self.identity}) + "\n")
            for name, entry in self.done.items():
                file.write(json.dumps({"file": name, **entry}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, journal)
        sync_folder(self.work)

    def add(self, file: TargetFile, digests: dict[str, str]) -> None:
        """Records a file that has its name."""
        header = hashlib.sha256(b"".join(content for _, content in file.literals)).hexdigest()
        entry = {"bytes": file.size, "header": header, "tensors": {t.name: digests[t.name] for t in file.tensors}}
        self.done[file.path] = entry
        with open(self.work / JOURNAL, "a") as journal:
            journal.write(json.dumps({"file": file.path, **entry}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def read_lines(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; the last may have been cut off."""
    if not journal.is_file():
        return []
    lines = []
    for text in journal.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """Makes the folder, and holds it by a descriptor: two conversions into one folder would spoil each other."""
    descriptor = -1
    while descriptor < 0:
        if work.is_symlink() or (work.exists() and not work.is_dir()):
            raise CheckpointError(work, "is not a folder", "conversions are written there first")
        try:
            work.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(work, f"cannot be made: {error.strerror}", "conversions are written there first") \
                from None
        try:
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another conversion has just given it its final name
        try:
            _lock(descriptor, work)
        except BaseException:
            os.close(descriptor)
            raise
        if not _is_at(descriptor, work):  # the one who held it has finished: begin again, with a new folder
            os.close(descriptor)
            descriptor = -1
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, work: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise CheckpointError(work, "is being written by another process") from None
            time.sleep(0.02)


def write_document(path: Path, content: bytes) -> None:
    """Writes a small file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + UNFINISHED)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
