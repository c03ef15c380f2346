"""The walks of schedule.h: every tile of every product exactly once, whatever the groups and the grid."""

from __future__ import annotations

import ctypes
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.kernels.cuda.gemm import Problem
from megatron_ext.kernels.cuda.tiles import COLUMNS, TILES, choose, grid, up
from tests.kernels.emulation.library import ABSENT, build

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))

LIMIT = 20_000
sizes = st.lists(st.sampled_from([0, 0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 700]), min_size=1, max_size=9)
names = st.sampled_from(list(TILES))


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("headers"), "headers.so")))


def walk(headers: ctypes.CDLL, kind: int, name: str, blocks: int, problem: Problem) -> list[tuple[int, ...]]:
    found = (ctypes.c_int * (6 * LIMIT))()
    count = headers.mext_walk(kind, list(TILES).index(name), blocks, ctypes.byref(problem), found, LIMIT)
    assert count < LIMIT
    return [tuple(found[6 * i : 6 * i + 6]) for i in range(count)]


def columns_of(name: str, n: int) -> range:
    """First columns of tiles; a pair's second tile may lie beyond n."""
    pair = TILES[name].pair
    return range(0, COLUMNS * pair * up(n, COLUMNS * pair), COLUMNS)


@settings(max_examples=60)
@given(name=names, m=st.integers(1, 3000), n=st.integers(1, 1500), k=st.integers(1, 900), sms=st.integers(2, 140))
def test_dense(headers: ctypes.CDLL, name: str, m: int, n: int, k: int, sms: int) -> None:
    rows = TILES[name].rows
    found = walk(headers, 0, name, grid(name, up(m, rows), n, sms), Problem(m=m, n=n, k=k, groups=1))
    expected = [(row, m, column, 0, 0, up(k, 128)) for row in range(0, m, rows) for column in columns_of(name, n)]
    assert Counter(found) == Counter(expected)


@settings(max_examples=80)
@given(name=names, sizes=sizes, n=st.integers(1, 600), sms=st.integers(2, 140))
def test_grouped(headers: ctypes.CDLL, name: str, sizes: list[int], n: int, sms: int) -> None:
    rows, array = TILES[name].rows, (ctypes.c_int64 * len(sizes))(*sizes)
    problem = Problem(m=sum(sizes), n=n, k=300, groups=len(sizes), group_sizes=ctypes.addressof(array))
    found = walk(headers, 1, name, grid(name, sum(sizes) // rows + len(sizes), n, sms), problem)
    expected = [
        (row, end, column, e, 0, 3)
        for e, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True))
        for row in range(end - size, end, rows)
        for column in columns_of(name, n)
    ]
    assert Counter(found) == Counter(expected)


@settings(max_examples=80)
@given(name=names, sizes=sizes, m=st.integers(1, 600), n=st.integers(1, 600), sms=st.integers(2, 140))
def test_contracted(headers: ctypes.CDLL, name: str, sizes: list[int], m: int, n: int, sms: int) -> None:
    rows, array = TILES[name].rows, (ctypes.c_int64 * len(sizes))(*sizes)
    problem = Problem(m=m, n=n, groups=len(sizes), group_sizes=ctypes.addressof(array))
    found = walk(headers, 2, name, grid(name, up(m, rows) * len(sizes), n, sms), problem)
    expected = [
        (row, m, column, e, (end - size) // 128 + e, up(size, 128))
        for e, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True))
        if size
        for row in range(0, m, rows)
        for column in columns_of(name, n)
    ]
    assert Counter(found) == Counter(expected)


def test_blocks_of_a_pair_walk_together(headers: ctypes.CDLL) -> None:
    """They share A: same rows, neighbouring columns, at every step."""
    array = (ctypes.c_int64 * 3)(300, 0, 5)
    problem = Problem(m=305, n=500, k=128, groups=3, group_sizes=ctypes.addressof(array))
    found = walk(headers, 1, "large_pair", 4, problem)
    half = len(found) // 4
    for first in (0, 2 * half):
        for one, other in zip(found[first : first + half], found[first + half : first + 2 * half], strict=True):
            assert (one[0], one[1], one[3:]) == (other[0], other[1], other[3:]) and other[2] == one[2] + 128


def test_a_wave_reads_a_square_patch(headers: ctypes.CDLL) -> None:
    """The tiles at work at one time need few different rows of A and B: they stay in L2."""
    found = walk(headers, 0, "medium", 132, Problem(m=8192, n=8192, k=128, groups=1))
    first_wave = [found[i] for i in _firsts(found)]
    rows, columns = {w[0] for w in first_wave}, {w[2] for w in first_wave}
    assert len(first_wave) == 132 and len(rows) <= 16 and len(columns) <= 18


def _firsts(found: list[tuple[int, ...]]) -> list[int]:
    """Where each block's work begins: blocks before 8192 * 8192 / 128^2 % 132 have one tile more."""
    more, each = len(found) % 132, len(found) // 132
    starts = accumulate([each + (b < more) for b in range(132)], initial=0)
    return list(starts)[:132]


@pytest.mark.parametrize(("m", "n", "expected"), [
    (4096, 7168, "large_pair"), (1, 7168, "small"), (64, 2112, "small"), (16384, 18432, "large_pair"),
])  # fmt: skip
def test_choice(m: int, n: int, expected: str) -> None:
    assert choose((m,), n, 132) == expected


@settings(max_examples=60)
@given(name=names, tiles=st.integers(1, 400), n=st.integers(1, 9000), sms=st.integers(2, 140))
def test_grid_fits_the_gpu_and_the_pair(name: str, tiles: int, n: int, sms: int) -> None:
    blocks = grid(name, tiles, n, sms)
    assert 0 < blocks <= sms and blocks % TILES[name].pair == 0
