"""Reading a folder that a stranger made: no name leads out of it, no link is followed, only plain files are opened.

Every name that comes from an index, a header or a pickle goes through `Folder`. A path is walked with `O_NOFOLLOW` from
the folder's own descriptor, so neither `..`, an absolute name nor a link swapped in later leads elsewhere.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from megatron_ext.config.errors import CheckpointError, shown

MAX_JSON = 1 << 28
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def check_name(name: str, where: Path | str, tensor: str | None = None) -> str:
    """A relative path, if by its words alone it stays inside.

    Raises:
        CheckpointError: it does not, or is no name of a file.
    """
    parts = name.split("/")
    odd = not name.isprintable() or "\\" in name or any(part in ("", ".", "..") or len(part) > 255 for part in parts)
    if odd or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise CheckpointError(where, f"names the file {name[:200]!r}, which is not plainly inside the folder",
                              tensor=tensor)
    return name


class Folder:
    """A folder that is read, by names relative to it.

    Args:
        path: the folder.
        follow_links: read through symbolic links, as in the cache of Hugging Face; refused without.
    """

    def __init__(self, path: Path, follow_links: bool = False):
        self.path, self.follow_links = path, follow_links
        if not path.is_dir():
            raise CheckpointError(path, "there is no such folder" if not path.exists() else "is not a folder")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def names(self) -> list[str]:
        """Names of everything directly inside, sorted."""
        return sorted(entry.name for entry in os.scandir(self.path))

    def has(self, name: str) -> bool:
        """Whether there is such a file, link or not; `open` then says what is wrong with it."""
        return os.path.lexists(self.path / check_name(name, self.path))

    def size(self, name: str) -> int:
        with self.open(name) as descriptor:
            return os.fstat(descriptor).st_size

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """A descriptor of a plain file, for reading.

        Raises:
            CheckpointError: it is missing, a link, no plain file, or cannot be opened.
        """
        descriptor = self.descriptor(name)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def descriptor(self, name: str) -> int:
        """As `open`; the caller closes it."""
        check_name(name, self.path)
        follow = 0 if self.follow_links else os.O_NOFOLLOW
        at = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            *folders, last = name.split("/")
            for folder in folders:
                inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | follow, dir_fd=at)
                os.close(at)
                at = inner
            descriptor = os.open(last, _FLAGS | follow, dir_fd=at)
        except OSError as error:
            raise CheckpointError(self.path / name, *self._why(name, error)) from None
        finally:
            os.close(at)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointError(self.path / name, "is not a plain file")
        return descriptor

    def _why(self, name: str, error: OSError) -> tuple[str, str | None, str | None]:
        paths = [self.path.joinpath(*name.split("/")[:n + 1]) for n in range(name.count("/") + 1)]
        if any(path.is_symlink() for path in paths) and not self.follow_links:
            hint = "if you trust where it leads, pass --follow-links (load.follow_links in the engine's config)"
            return "is a symbolic link", "links are not followed", hint
        if isinstance(error, FileNotFoundError):
            return "does not exist", None, None
        return f"cannot be read: {error.strerror}", None, None

    def check(self, name: str) -> None:
        """Raises what `read` would, without reading."""
        if (size := self.size(name)) > MAX_JSON:
            raise CheckpointError(self.path / name, f"has {size} bytes", f"at most {MAX_JSON} are read")

    def read(self, name: str, limit: int = MAX_JSON) -> bytes:
        """The content of a small file.

        Raises:
            CheckpointError: it is longer than `limit`, or cannot be read.
        """
        with self.open(name) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise CheckpointError(self.path / name, f"has {size} bytes", f"at most {limit} are read")
            content = b""
            while len(content) < size and (more := os.pread(descriptor, size - len(content), len(content))):
                content += more
            return content

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a file that holds one JSON object; a key that appears twice is refused."""
        return parse_json(self.read(name), self.path / name)


def parse_json(content: bytes, where: Path | str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        CheckpointError: it is not JSON, no object, or has a key twice.
    """
    try:
        values = json.loads(content, object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(where, "is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(where, f"cannot be read as JSON: {shown(str(error))}") from None
    if not isinstance(values, dict):
        raise CheckpointError(where, "must hold one JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:100]} appears twice")
            seen.add(name)
    return values
