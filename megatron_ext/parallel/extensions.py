"""The folder where DeepSpeed's operators are compiled at run time: private, watched for locks of killed builds.

DeepSpeed compiles C++ when it first needs it (on a CPU a shared-memory operator in `init_distributed`, about 30 s)
through `torch.utils.cpp_extension.load`, which guards each build with a lock file that nothing ever times out. A
build that is killed leaves its lock, and every later start waits on it for ever without a word (pytorch #189245). So,
before DeepSpeed starts:

* `prepare_extensions` gives this package a folder of its own, one per host, Python and torch, unless
  TORCH_EXTENSIONS_DIR is set;
* `check_stale_locks` removes locks that no living process holds;
* `announce_build` says what is about to be compiled.

How a lock is known to be stale: torch opens the file to create it and keeps it open until the build ends, so a
process that builds shows it among its open files in /proc. (Its compilers do not, and may outlive it.) That sees this
host only, which is why our folder carries the host's name and why a lock in a folder that somebody else chose (it may
lie on a file system that other hosts build in) must be old as well.

Nothing here imports torch or DeepSpeed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""What DeepSpeed compiles on a CPU whenever it initialises its communication."""

CHOSEN_FOLDER_AGE = 15 * 60.0
"""Seconds after which an unheld lock is stale in a folder we did not choose; DeepSpeed's longest build took 334 s."""

LEFTOVER_TIME = 300.0
"""Seconds that the compilers of a killed build get to end by themselves."""

_VARIABLE = "TORCH_EXTENSIONS_DIR"
_log = logging.getLogger("megatron_ext")


def default_folder() -> Path:
    """Where builds go unless TORCH_EXTENSIONS_DIR is set: a folder per host, Python and torch in the user's cache."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME and no entry for the user
        cache = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = "unknown"
    tag = f"{platform.node() or 'localhost'}-py{sys.version_info.major}{sys.version_info.minor}-torch{torch_version}"
    return cache / "megatron_ext" / "torch_extensions" / tag


def extensions_folder() -> Path:
    """The folder in force: TORCH_EXTENSIONS_DIR, or ours. It need not exist yet."""
    return Path(os.environ.get(_VARIABLE) or default_folder())


def prepare_extensions() -> Path:
    """Sends run-time builds to our own folder, unless TORCH_EXTENSIONS_DIR is set; `import megatron_ext` calls it.

    Sets the environment variable (so that processes started from here inherit it) and touches no file. The programs
    beside this Python come first on PATH: another ninja takes what this environment's has built for out of date, and
    compiles it again for minutes, without a word.
    """
    folder = extensions_folder()
    os.environ[_VARIABLE] = str(folder)
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if own not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (own, path)))
    return folder


def find_unheld_locks(folder: Path | None = None) -> list[Path]:
    """Locks under `folder` (default: the one in force) that no process of this host has open. Changes nothing.

    Two looks half a second apart must agree. Where it cannot be seen who has what open (no /proc, another user's lock)
    no lock is called unheld.
    """
    folder = extensions_folder() if folder is None else folder
    first = _look(folder)
    if not first:
        return []
    time.sleep(0.5)  # a build that ends closes its lock a moment before it removes it
    second = _look(folder)
    return sorted(path for path, identity in first.items() if second.get(path) == identity)


def check_stale_locks(folder: Path | None = None) -> list[Path]:
    """Removes the locks of killed builds, one logged line for each, and returns them.

    Every rank calls it before DeepSpeed starts. Ranks of a host take turns, so that none removes the lock of a build
    that another has just begun. A folder that cannot be written is left alone. An unheld lock that may be another
    host's is named in the log, and removed once it is old. Compilers that outlive the Python that started them are
    waited for, at most `LEFTOVER_TIME`, so that nobody writes into the new build.
    """
    folder = extensions_folder() if folder is None else folder
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return []
    removed = []
    wait = 0.0 if folder == default_folder() else CHOSEN_FOLDER_AGE
    with open(folder / ".megatron_ext.turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for path in find_unheld_locks(folder):
            if time.time() - path.stat().st_mtime < wait:
                _log.warning("%s is held by no process here: remove it if no other host is building there", path)
                continue
            _wait_for_leftovers(path.parent)
            path.unlink(missing_ok=True)
            removed.append(path)
            _log.warning("removed %s, left by a build that was killed: every start would have waited for it", path)
    return removed


def announce_build(rank: int = 0, op: str = SHARED_MEMORY_OP, seconds: int = 30) -> bool:
    """Says, on rank 0, that DeepSpeed is about to compile `op`. For runs on the CPU, before DeepSpeed initialises.

    Returns:
        Whether a build is ahead: the operator is neither installed with DeepSpeed nor in the folder in force.
    """
    folder = extensions_folder()
    deepspeed = importlib.util.find_spec("deepspeed")
    installed = deepspeed is not None and any(
        any(Path(place).glob(f"ops/**/{op}_op*.so")) for place in deepspeed.submodule_search_locations or ()
    )
    ahead = not installed and not (folder / op / f"{op}.so").is_file()
    if ahead and rank == 0:
        print(f"building {op} in {folder}, about {seconds} s, once", flush=True)
    return ahead


def _look(folder: Path) -> dict[Path, tuple[int, int]]:
    """The unheld locks under `folder` at this moment, each with (inode, mtime) by which to know it again."""
    locks = list(folder.glob("**/lock"))
    held = _links("fd/*") if locks else set()
    found = {}
    for lock in locks if held else ():
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            status = lock.stat()
            if str(lock.resolve()) not in held and status.st_uid == os.getuid():
                found[lock] = status.st_ino, status.st_mtime_ns
    return found


def _wait_for_leftovers(folder: Path) -> None:
    deadline = time.monotonic() + LEFTOVER_TIME
    if str(folder.resolve()) in _links("cwd"):
        _log.warning("waiting for the compilers of a killed build in %s", folder)
        while time.monotonic() < deadline and str(folder.resolve()) in _links("cwd"):
            time.sleep(0.2)


def _links(name: str) -> set[str]:
    """Where the links /proc/<pid>/`name` of all processes that may be seen point; empty without /proc."""
    targets = set()
    for link in Path("/proc").glob(f"[0-9]*/{name}"):
        with contextlib.suppress(OSError):  # the process is gone, or another user's
            targets.add(os.readlink(link))
    return targets
