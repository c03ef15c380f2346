"""Damaged and hostile checkpoints of every format: a refusal in one line, or a whole result, and nothing else."""

from __future__ import annotations

import os
import random
import shutil
import struct
import zipfile
from pathlib import Path

import pytest

from megatron_ext.checkpoint.convert import FORMATS, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.source import MANIFEST
from megatron_ext.config.errors import UserError
from tests.checkpoint.test_torch_file import HOSTILE
from tests.checkpoint.tiny import convert, make

WORDS = [b"../", b"9" * 30, b"null", b"\"", b"{", b"-1", b"1e999", b"\0", b"cos\nsystem\n", b"\x85R.", b"\xff" * 8]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each format."""
    folder = tmp_path_factory.mktemp("good")
    made = {"hf": make(folder / "hf", "fp8", shards=2, mtp=1)}
    for format in FORMATS:
        if format.name != "hf":
            made[format.name] = convert(made["hf"], folder / format.name, format.name)
    return made


def described(path: Path, content: bytes) -> int:
    """Bytes at the start of a file that say what the rest is; the rest are numbers, which may be anything."""
    if path.suffix == ".safetensors":
        return 8 + struct.unpack("<Q", content[:8])[0]
    return len(content)


def damage(draw: random.Random, path: Path) -> None:
    """Changes some bytes, cuts the file or grows it; or puts a hostile pickle in place of the one that is there."""
    content = bytearray(path.read_bytes())
    end = described(path, content) if draw.random() < 0.9 else len(content)
    kind = draw.randrange(6)
    if kind == 0 or not end:
        for _ in range(draw.randint(1, 8) if end else 0):
            content[draw.randrange(end)] = draw.randrange(256)
    elif kind == 1:
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del content[draw.randrange(end):]
    elif kind == 3:
        at = draw.randrange(end)
        content[at:at] = content[draw.randrange(end):][:draw.randint(1, 40)]
    elif kind == 4 or (path.suffix not in (".pt", ".distcp") and path.name != ".metadata"):
        at = draw.randrange(end)
        content[at:at + draw.randint(1, 40)] = draw.choice(WORDS)
    else:
        hostile = draw.choice([case for name, case in HOSTILE.items() if not name.startswith("nested")])
        if path.name == ".metadata":
            content = bytearray(hostile)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", hostile)
                archive.writestr("archive/version", "3\n")
            return
    path.write_bytes(bytes(content))


def check(good: Path, work: Path, times: int, seed: str) -> None:
    """Damages a copy of a checkpoint in one file and converts it, again and again."""
    outside = {path: path.stat().st_mtime_ns for path in good.rglob("*")}
    work.mkdir()
    draw, refused = random.Random(seed), 0
    # A file that describes is as likely to be hit as any of the many that hold numbers.
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix in (".json", ".txt", ".metadata") or "latest" in path.name]
    for number in range(times):
        bad = work / "bad"
        shutil.copytree(good, bad)
        (bad / MANIFEST).unlink(missing_ok=True) if number % 3 else None
        choice = draw.choice(small if number % 4 == 0 and small else files)
        damage(draw, bad / choice) if (bad / choice).exists() else None
        try:
            plan = make_plan(open_checkpoint(bad), named("hf" if number % 4 else "deepseek"), optimizer="drop")
            run(plan, work / "out")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 2000, str(error)
            assert not (work / "out").exists()
        assert {path.name for path in work.iterdir()} <= {"bad", "out"}
        for path in list(work.iterdir()):
            shutil.rmtree(path)
    assert refused > times / 5
    assert outside == {path: path.stat().st_mtime_ns for path in good.rglob("*")}


NAMES = [format.name for format in FORMATS]


@pytest.mark.parametrize("name", NAMES)
def test_fuzzed_bytes(checkpoints: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check(checkpoints[name], tmp_path / "work", 40, name)
    assert not os.listdir(tmp_path / "here")  # what hostile pickles would have made


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_many_fuzzed_bytes(checkpoints: dict[str, Path], tmp_path: Path, name: str,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 of them in all."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check(checkpoints[name], tmp_path / "work", -(-2000 // len(NAMES)), name + " many")
    assert not os.listdir(tmp_path / "here")
