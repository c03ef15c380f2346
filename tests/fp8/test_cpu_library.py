"""Threads of the compiled CPU library, which are torch's, and memory, which is used again: results tell of neither."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.cpu import library
from megatron_ext.kernels.cpu import quantize as cpu
from megatron_ext.kernels.cpu.memory import empty
from megatron_ext.kernels.reference import quantize as reference
from tests.fp8.backends import assert_same_bytes

pytestmark = pytest.mark.skipif(library.load() is None, reason="the compiled CPU kernels were not built")
SIZE = 3 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def address(shape: tuple[int, ...] = (SIZE,), dtype: torch.dtype = torch.uint8) -> int:
    """Where a result would lie that nobody keeps."""
    return empty(shape, dtype).data_ptr()


# ---- memory --------------------------------------------------------------------------------------


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    x = empty((SIZE,), torch.uint8)
    where, view = x.data_ptr(), x.view(-1, 1024)[5:]
    del x
    assert address() != where, "a view still holds it"
    view.fill_(7)
    other = empty((SIZE,), torch.uint8).fill_(8)
    assert (view == 7).all() and (other == 8).all()
    del view
    assert address() == where


def test_what_comes_is_an_ordinary_tensor() -> None:
    x = empty((3, 1000, 1000), torch.float8_e4m3fn)
    assert x.shape == (3, 1000, 1000) and x.is_contiguous() and not x._is_view() and x.data_ptr() % 64 == 0
    assert x.untyped_storage().nbytes() == x.numel()
    y = empty((1000, 1000)).fill_(2.0)
    assert torch.equal(y.clone().requires_grad_() * 3, torch.full((1000, 1000), 6.0))
    assert address((1000, 999), torch.float32) != y.data_ptr()
    assert empty((0, 5)).shape == (0, 5) and empty((), torch.bfloat16).numel() == 1


def test_sizes_that_are_close_share_memory() -> None:
    where = address((1000, 1000))
    assert address((999, 1000)) == where


def test_threads_take_and_give_at_once() -> None:
    wrong = []

    def work(mark: int) -> None:
        for i in range(200):
            x = empty((1 << 18,), torch.uint8).fill_(mark)
            held = [empty((1 << 19,), torch.uint8).fill_(mark) for _ in range(i % 3)]
            if not all(bool((t == mark).all()) for t in (x, *held)):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- threads -------------------------------------------------------------------------------------


def numbers() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(1500, 1024)
    return x, reference.quantize(x)


def test_without_the_runtime_of_torch_the_bytes_are_the_same(three_threads: None) -> None:
    x, expected = numbers()
    loaded = library.load()
    assert loaded is not None
    loaded.mext_use_threads_of(None)
    try:
        assert_same_bytes(cpu.quantize(x), expected)
    finally:
        assert library.use_threads_of_torch(loaded), "torch on Linux has OpenMP"
    assert_same_bytes(cpu.quantize(x), expected)


def test_python_threads_share_the_library(three_threads: None) -> None:
    x, expected = numbers()
    found: list[tuple[Tensor, Tensor]] = []
    threads = [threading.Thread(target=lambda: found.extend(cpu.quantize(x) for _ in range(20))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    for one in found:
        assert_same_bytes(one, expected)


FORK = """
import os, sys, torch
from megatron_ext.kernels.cpu import quantize as cpu
torch.set_num_threads(3)
x = torch.randn(1500, 1024)
expected = cpu.quantize(x)
pid = os.fork()
data, scale = cpu.quantize(x)
same = [bytes(t.view(torch.uint8).numpy()) for t in (data, expected[0])]
if not pid:
    os._exit(0 if same[0] == same[1] else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or same[0] != same[1])
"""


def test_a_child_after_a_fork_does_not_wait_for_threads_that_it_lacks() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120, cwd=ROOT)
