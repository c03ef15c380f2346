"""The folder of run-time builds: ours unless one is chosen, and no lock of a killed build survives a start.

The locks here are torch's own (`FileBaton`), taken by a process that is then killed, as happens to people.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.parallel import extensions

BUILD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(60)
"""


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default folder, in a cache of the test's own, with a place for one operator."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    folder = extensions.default_folder()
    (folder / "some_op").mkdir(parents=True)
    return folder


@pytest.fixture
def build(ours: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of a build in our folder."""
    command = [sys.executable, "-c", BUILD, str(ours / "some_op" / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_default_folder_is_private_and_a_chosen_one_is_honoured(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ours.is_relative_to(tmp_path / "megatron_ext" / "torch_extensions")
    assert extensions.prepare_extensions() == ours
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(ours)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    assert extensions.prepare_extensions() == tmp_path / "chosen"
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "chosen")
    assert not (tmp_path / "chosen").exists()


def test_a_lock_is_kept_while_its_build_lives_and_removed_once_it_was_killed(
    build: subprocess.Popen, ours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = ours / "some_op" / "lock"
    assert extensions.check_stale_locks() == []
    assert lock.exists()
    build.kill()
    build.wait()
    assert extensions.find_unheld_locks() == [lock]
    assert extensions.check_stale_locks() == [lock]
    assert not lock.exists()
    assert [record.message for record in caplog.records if str(lock) in record.message] == caplog.messages
    assert len(caplog.messages) == 1


def test_compilers_that_outlive_their_python_are_waited_for(ours: Path) -> None:
    lock = ours / "some_op" / "lock"
    lock.touch()
    with subprocess.Popen(["sleep", "2"], cwd=lock.parent) as compiler:
        assert extensions.find_unheld_locks() == [lock]
        assert compiler.poll() is None
        assert extensions.check_stale_locks() == [lock]
        # the process may be a zombie until it is waited for, but works no more
        assert compiler.wait(timeout=0.5) == 0


def test_in_a_chosen_folder_a_lock_must_be_old_for_another_host_may_hold_it(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    lock = tmp_path / "chosen" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert extensions.check_stale_locks() == []
    assert str(lock) in caplog.text
    long_ago = time.time() - extensions.CHOSEN_FOLDER_AGE - 1
    os.utime(lock, (long_ago, long_ago))
    assert extensions.check_stale_locks() == [lock]


def test_no_folder_no_locks(ours: Path, tmp_path: Path) -> None:
    assert extensions.check_stale_locks() == []
    assert extensions.check_stale_locks(tmp_path / "absent") == []


def test_a_build_is_announced_once_by_one_rank(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extensions.announce_build(rank=1)
    assert capsys.readouterr().out == ""
    assert extensions.announce_build(rank=0)
    assert capsys.readouterr().out == f"building deepspeed_shm_comm in {ours}, about 30 s, once\n"
    (ours / "deepspeed_shm_comm").mkdir()
    (ours / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    assert not extensions.announce_build(rank=0)
    assert capsys.readouterr().out == ""
