"""Conversions that are killed, that fail, and that run twice: the result is whole and the same, or not there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.convert import FORMATS, Options, journal, make_plan, named, open_checkpoint, run, work
from megatron_ext.checkpoint.convert import dtype as numbers
from megatron_ext.checkpoint.convert.source import MANIFEST
from megatron_ext.checkpoint.convert.verify import verify
from megatron_ext.config.errors import CheckpointError
from tests.checkpoint import tiny
from tests.checkpoint.tiny import equal, files, load, make

SHARD = 500_000
FORK = multiprocessing.get_context("fork")


def start(source: Path, destination: Path, to: str = "hf", workers: int = 1) -> None:
    options = {"deepseek": Options(mp=2), "megatron-legacy": Options(tp=2, ep=2), "deepspeed": Options()}
    plan = make_plan(open_checkpoint(source), named(to), options.get(to, Options(SHARD)), "bf16")
    run(plan, destination, workers)


def killed(after: float, *args: Any) -> bool:
    """Starts a conversion in a process of its own, and kills it after some seconds; whether that was in time."""
    process = FORK.Process(target=start, args=args)
    process.start()
    process.join(after)
    process.kill()  # nothing, if it has ended
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "fp8", "fp8", shards=3, mtp=1, wide=True)


def check_kills(source: Path, tmp_path: Path, times: int, to: str) -> None:
    begin = time.perf_counter()
    start(source, tmp_path / "whole", to)
    length, expected = time.perf_counter() - begin, files(tmp_path / "whole")
    draw, in_time, number = random.Random(times), 0, 0
    while in_time < times:
        number += 1
        out = tmp_path / f"out{number}"
        for _ in range(draw.randint(1, 2)):
            in_time += killed(draw.uniform(0, 1.1 * length), source, out, to, 1 + number % 2)
            assert not out.exists() or (out / MANIFEST).exists()
        start(source, out, to)
        assert files(out) == expected
        assert not list(tmp_path.glob("*" + journal.UNFINISHED))


@pytest.mark.parametrize("to", ["hf", "megatron-legacy"])
def test_killed_at_any_moment_it_goes_on(source: Path, tmp_path: Path, to: str) -> None:
    check_kills(source, tmp_path, 3, to)


@pytest.mark.slow
@pytest.mark.parametrize("to", [format.name for format in FORMATS])
def test_killed_at_thirty_moments_it_goes_on(source: Path, tmp_path: Path, to: str) -> None:
    check_kills(source, tmp_path, 30, to)


class Crash(BaseException):
    """Stands for a kill between two steps of our own."""


def steps_until(monkeypatch: pytest.MonkeyPatch, crash_at: int) -> None:
    """Crashes at the n-th rename or removal."""
    count = 0

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def step(*args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count > crash_at:
                raise Crash
            call(*args, **kwargs)
        return step

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


def test_between_any_two_steps_it_can_stop(source: Path, tmp_path: Path) -> None:
    """And whole files are not written again."""
    start(source, tmp_path / "whole")
    expected, crashes = files(tmp_path / "whole"), 0
    for crash_at in (0, 1, 2, 5, 19, 22, 23, 24, 25, 26, 27, 28, 29):
        out = tmp_path / f"out{crash_at}"
        with pytest.MonkeyPatch.context() as patch:
            steps_until(patch, crash_at)
            try:
                start(source, out)
            except Crash:
                crashes += 1
        assert not out.exists() or (out / MANIFEST).exists()
        kept = {path: path.stat().st_ino for path in (tmp_path / (out.name + journal.UNFINISHED)).glob("*.safetensors")}
        start(source, out)
        assert files(out) == expected
        assert all((out / path.name).stat().st_ino == inode for path, inode in kept.items())
    assert crashes > 5


def test_a_source_that_changed_is_not_taken_for_done(source: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(source, mine)
    start(mine, out)
    path = next(mine.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="already exists"):
        start(mine, out)


def test_what_lies_where_the_result_would_be_written_stays(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out.converting" / "precious.pt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds precious\.pt, and no journal"):
        start(source, tmp_path / "out")
    assert precious.read_text() == "mine"


def test_what_is_done_is_not_done_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    start(source, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(CheckpointError, match="already exists"):
        run(make_plan(open_checkpoint(source), named("hf")), out)


def test_what_another_conversion_left_is_not_touched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        steps_until(patch, 5)
        start(source, out)
    left = files(tmp_path / "out.converting")
    assert len(left) > 1
    with pytest.raises(CheckpointError, match="another conversion"):
        run(make_plan(open_checkpoint(source), named("hf")), out)
    assert files(tmp_path / "out.converting") == left


def test_files_are_on_the_disk_before_they_have_their_names(source: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, replace = os.fsync, os.replace
    synced: set[int] = set()
    named_late: list[str] = []

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def check(old: Path, new: Path) -> None:
        if os.stat(old).st_ino not in synced:
            named_late.append(str(new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "replace", check)
    start(source, tmp_path / "out")
    assert not named_late and len(synced) > 5


def test_verifying_finds_what_is_wrong(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong numbers under a right checksum, a changed file, a tensor less."""
    plan, out = make_plan(open_checkpoint(source), named("hf"), Options(SHARD), "bf16"), tmp_path / "out"
    with monkeypatch.context() as patch:
        dequantise = numbers.dequantise
        patch.setattr(numbers, "dequantise", lambda *args: dequantise(*args) ^ 1)
        run(plan, out)
    with pytest.raises(CheckpointError, match=r"tensor .* does not come back|is not what its carried scales give"):
        verify(plan, out)
    shutil.rmtree(out)
    other = make(tmp_path / "other", "fp8", mtp=1, wide=True, seed=1)
    wrong = make_plan(open_checkpoint(other), named("hf"), None, None)
    run(wrong, out)
    same = make_plan(open_checkpoint(source), named("hf"), None, None)
    with pytest.raises(CheckpointError, match="does not come back"):
        verify(same, out)
    path = out / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="has other content"):
        verify(wrong, out)
    with pytest.raises(CheckpointError, match="the plan has"):
        verify(plan, out)


def test_two_at_once_do_not_spoil_each_other(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_PATIENCE", 0.1)
    with journal.locked(tmp_path / "out.converting"), pytest.raises(CheckpointError, match="by another process"):
        start(source, tmp_path / "out")


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is written, when a file is made, or in the middle; then it goes on from there."""
    status = os.statvfs(tmp_path)
    full = os.statvfs_result((*status[:4], 3, *status[5:]))
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"needs .* GB; the disk has"):
        patch.setattr(os, "statvfs", lambda path: full)
        start(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())

    def fail(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(CheckpointError, match=r"model-00001-of-\d+.*: the disk is full"):
            start(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    write, count = os.pwrite, 0

    def fail_late(*args: Any) -> int:
        nonlocal count
        count += isinstance(args[1], memoryview)
        return write(*args) if count < 40 else fail()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail_late)
        with pytest.raises(CheckpointError) as caught:
            start(source, tmp_path / "out")
    assert "tensor model.layers" in str(caught.value) and "disk is full" in str(caught.value)
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
    start(source, tmp_path / "out")
    start(source, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_a_flipped_bit_is_named(source: Path, tmp_path: Path) -> None:
    """In a checkpoint of ours, by its manifest, whether the tensor is moved or changed; any of its bits."""
    start(source, tmp_path / "ours")
    draw = random.Random(0)
    for stored in draw.sample(open_checkpoint(tmp_path / "ours").stored, 8):
        path = tmp_path / "ours" / stored.file
        at = stored.offset + draw.randrange(stored.nbytes)
        good = path.read_bytes()
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1:])
        opened = open_checkpoint(tmp_path / "ours")
        for to, dtype in (("hf", None), ("hf", "fp32"), ("deepseek", None)):
            with pytest.raises(CheckpointError) as caught:
                run(make_plan(opened, named(to), None, dtype), tmp_path / "out")
            assert stored.file in str(caught.value) and caught.value.tensor == stored.name
            assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
        path.write_bytes(good)


def test_a_worker_that_dies_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_write", lambda *args: os._exit(9))
    with pytest.raises(CheckpointError, match="a worker was killed"):
        start(source, tmp_path / "out", workers=2)


def test_errors_of_workers_name_file_and_tensor(tmp_path: Path) -> None:
    tensors, name = tiny.tensors_of(tiny.config(wide=True), "fp8"), "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name].view(torch.uint8)[200, 3] = 0x7F
    source = tiny.save(tmp_path / "source", tiny.config(wide=True), tensors)
    for workers in (1, 2):
        with pytest.raises(CheckpointError, match=r"source/model.safetensors: tensor .*2.up_proj.weight holds NaN"):
            run(make_plan(open_checkpoint(source), named("hf"), None, "bf16"), tmp_path / "out", workers)
        assert not (tmp_path / "out").exists()


def test_weights_changed_since_they_were_fp8_are_not_clipped(tmp_path: Path) -> None:
    """Trained on, say: the carried scales are not theirs any more."""
    source = make(tmp_path / "source", "fp8", wide=True)
    bf16 = tiny.convert(source, tmp_path / "bf16", "hf", "bf16")
    tensors = load(bf16)
    tensors["model.layers.0.mlp.up_proj.weight"][5, 7] *= 1.03
    (bf16 / MANIFEST).unlink()
    tiny.save(bf16, json.loads((bf16 / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=r"0.mlp.up_proj.weight is not what its carried scales give"):
        run(make_plan(open_checkpoint(bf16), named("hf"), None, "fp8"), tmp_path / "out")


def memory(queue: Any, source: Path, destination: Path, to: str, dtype: str | None) -> None:
    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024

    plan = make_plan(open_checkpoint(source), named(to), None, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = field("VmRSS")
    run(plan, destination)
    queue.put((field("VmHWM") - before, plan.memory, max(t.nbytes for file in plan.files for t in file.tensors)))


@pytest.mark.parametrize(("to", "dtype"), [("deepseek", None), ("hf", "bf16"), ("deepspeed", None), ("megatron", None)])
def test_memory_is_bounded(tmp_path: Path, to: str, dtype: str | None) -> None:
    """No more than the plan says, and than twice the largest tensor."""
    tensors = tiny.tensors_of(tiny.config(), "fp8")
    values = tiny.config(vocab_size=1 << 20)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.ones(1 << 20, 32, dtype=torch.bfloat16)
    source, queue = tiny.save(tmp_path / "source", values, tensors), FORK.SimpleQueue()
    process = FORK.Process(target=memory, args=(queue, source, tmp_path / "out", to, dtype))
    process.start()
    process.join()
    assert process.exitcode == 0
    used, planned, largest = queue.get()
    assert used <= planned + (8 << 20) and used <= 2 * largest


def test_equal_is_about_bits() -> None:
    assert not equal({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])})
